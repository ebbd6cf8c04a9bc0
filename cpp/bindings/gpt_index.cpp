#include "fastllm/gpt_index.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "binding.hpp"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class Index>
py::array sample_index(const Array<int32_t>& lengths, const Array<int32_t>& document_index,
                       int64_t seq_length, int extra, size_t samples) {
    py::array_t<Index> rows({samples + 1, size_t(2)});
    const int32_t* const lens = lengths.data();
    const int32_t* const docs = document_index.data();
    const auto sequences = size_t(lengths.size()), documents = size_t(document_index.size());
    Index* const out = rows.mutable_data();
    const py::gil_scoped_release release;
    fastllm::build_sample_index<Index>(lens, sequences, docs, documents, seq_length, extra, samples,
                                       out);
    return rows;
}

template <class Index>
py::array shuffle_index(size_t first_part, size_t samples, fastllm::LegacyRandom& random) {
    py::array_t<Index> order(static_cast<py::ssize_t>(samples));
    Index* const out = order.mutable_data();
    const py::gil_scoped_release release;
    fastllm::build_shuffle_index<Index>(first_part, samples, random, out);
    return order;
}

py::tuple gpt_indices(const Array<int32_t>& lengths, const Array<int32_t>& documents, size_t epochs,
                      bool separate, int64_t seq_length, int extra, size_t samples,
                      size_t first_part, uint32_t seed) {
    if (lengths.ndim() != 1 || documents.ndim() != 1)
        throw std::invalid_argument("arrays must have one dimension");
    if (documents.size() == 0 || epochs == 0)
        throw std::invalid_argument("there is no document to draw from");
    if (seq_length < 1 || (extra != 0 && extra != 1))
        throw std::invalid_argument("bad sequence length");
    if (first_part > samples) throw std::invalid_argument("first_part exceeds samples");
    const auto count = size_t(documents.size());
    py::array_t<int32_t> document_index(static_cast<py::ssize_t>(count * epochs));
    fastllm::LegacyRandom random(seed);
    {
        const int32_t* const from = documents.data();
        int32_t* const out = document_index.mutable_data();
        const py::gil_scoped_release release;
        fastllm::build_document_index(from, count, epochs, separate, random, out);
    }
    const auto int32_max = size_t(std::numeric_limits<int32_t>::max());
    py::array rows =
        count * epochs <= int32_max
            ? sample_index<int32_t>(lengths, document_index, seq_length, extra, samples)
            : sample_index<int64_t>(lengths, document_index, seq_length, extra, samples);
    py::array order = samples < size_t(std::numeric_limits<uint32_t>::max()) - 1
                          ? shuffle_index<uint32_t>(first_part, samples, random)
                          : shuffle_index<int64_t>(first_part, samples, random);
    return py::make_tuple(document_index, rows, order);
}

py::tuple blend(const Array<double>& weights, size_t samples) {
    const auto datasets = size_t(weights.size());
    if (datasets == 0 || datasets >= 32767)
        throw std::invalid_argument("a blend takes 1 to 32766 datasets");
    py::array_t<int16_t> index(static_cast<py::ssize_t>(samples));
    py::array_t<int64_t> sample(static_cast<py::ssize_t>(samples));
    const double* const w = weights.data();
    int16_t* const index_out = index.mutable_data();
    int64_t* const sample_out = sample.mutable_data();
    {
        const py::gil_scoped_release release;
        fastllm::build_blend(w, datasets, samples, index_out, sample_out);
    }
    return py::make_tuple(index, sample);
}

py::tuple exhaustive_blend(const Array<int64_t>& sizes) {
    const auto datasets = size_t(sizes.size());
    if (datasets == 0 || datasets >= 32767)
        throw std::invalid_argument("a blend takes 1 to 32766 datasets");
    int64_t total = 0;
    for (size_t j = 0; j < datasets; ++j) {
        if (sizes.at(j) < 0) throw std::invalid_argument("a size is negative");
        total += sizes.at(j);
    }
    py::array_t<int16_t> index(static_cast<py::ssize_t>(total));
    py::array_t<int64_t> sample(static_cast<py::ssize_t>(total));
    const int64_t* const s = sizes.data();
    int16_t* const index_out = index.mutable_data();
    int64_t* const sample_out = sample.mutable_data();
    {
        const py::gil_scoped_release release;
        fastllm::build_exhaustive_blend(s, datasets, index_out, sample_out);
    }
    return py::make_tuple(index, sample);
}

}  // namespace

FASTLLM_BINDING(gpt_index) {
    m.def("gpt_indices", &gpt_indices, py::kw_only(), py::arg("lengths"), py::arg("documents"),
          py::arg("epochs"), py::arg("separate"), py::arg("seq_length"), py::arg("extra"),
          py::arg("samples"), py::arg("first_part"), py::arg("seed"));
    m.def("blend", &blend, py::arg("weights"), py::arg("samples"));
    m.def("exhaustive_blend", &exhaustive_blend, py::arg("sizes"));
}
