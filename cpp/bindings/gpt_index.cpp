#include "fastllm/gpt_index.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <future>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "binding.hpp"
#include "fastllm/blend.hpp"
#include "fastllm/gpt_sample.hpp"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class Index>
py::array_t<Index> rows_of(size_t samples) {
    return py::array_t<Index>({samples + 1, size_t(2)});
}
template <class Index>
py::array_t<Index> vector_of(size_t size) {
    return py::array_t<Index>(static_cast<py::ssize_t>(size));
}

int64_t count_tokens(const Array<int32_t>& lengths, const Array<int32_t>& documents) {
    const int32_t* const lens = lengths.data();
    const int32_t* const docs = documents.data();
    const auto sequences = size_t(lengths.size()), count = size_t(documents.size());
    const py::gil_scoped_release release;
    return fastllm::count_tokens(lens, sequences, docs, count);
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
    const auto count = size_t(documents.size()), sequences = size_t(lengths.size());
    const auto all = count * epochs;
    const bool wide_rows = all > size_t(std::numeric_limits<int32_t>::max());
    const bool wide_order = samples >= size_t(std::numeric_limits<uint32_t>::max()) - 1;
    auto document_index = vector_of<int32_t>(all);
    py::array rows = wide_rows ? py::array(rows_of<int64_t>(samples)) : rows_of<int32_t>(samples);
    py::array order =
        wide_order ? py::array(vector_of<int64_t>(samples)) : vector_of<uint32_t>(samples);
    const int32_t* const lens = lengths.data();
    const int32_t* const from = documents.data();
    int32_t* const docs = document_index.mutable_data();
    void* const rows_out = rows.mutable_data();
    void* const order_out = order.mutable_data();
    {
        const py::gil_scoped_release release;
        fastllm::LegacyRandom random(seed);
        fastllm::build_document_index(from, count, epochs, separate, random, docs);
        // The order needs nothing but the random numbers that follow, so it is made meanwhile.
        auto order_made = std::async(std::launch::async, [&] {
            if (wide_order)
                fastllm::build_shuffle_index(first_part, samples, random,
                                             static_cast<int64_t*>(order_out));
            else
                fastllm::build_shuffle_index(first_part, samples, random,
                                             static_cast<uint32_t*>(order_out));
        });
        if (wide_rows)
            fastllm::build_sample_index(lens, sequences, docs, all, seq_length, extra, samples,
                                        static_cast<int64_t*>(rows_out));
        else
            fastllm::build_sample_index(lens, sequences, docs, all, seq_length, extra, samples,
                                        static_cast<int32_t*>(rows_out));
        order_made.get();
    }
    return py::make_tuple(document_index, rows, order);
}

int threads_or_all(std::optional<int> threads) {
    return threads.value_or(int(std::thread::hardware_concurrency()));
}

py::tuple blend(const Array<double>& weights, size_t samples, std::optional<int> threads) {
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
        fastllm::build_blend(w, datasets, samples, index_out, sample_out, threads_or_all(threads));
    }
    return py::make_tuple(index, sample);
}

py::tuple exhaustive_blend(const Array<int64_t>& sizes, std::optional<int> threads) {
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
        fastllm::build_exhaustive_blend(s, datasets, index_out, sample_out,
                                        threads_or_all(threads));
    }
    return py::make_tuple(index, sample);
}

// Reads items of one dataset; keeps what it reads from alive.
class SampleReader {
  public:
    SampleReader(const py::buffer& idx, const py::buffer& bin, size_t header_bytes,
                 size_t sequences, size_t item_size, Array<int32_t> document_index,
                 py::array sample_index, py::array shuffle_index, const fastllm::SampleRules& rules)
        : idx_(idx.request()),
          bin_(bin.request()),
          document_index_(std::move(document_index)),
          sample_index_(std::move(sample_index)),
          shuffle_index_(std::move(shuffle_index)),
          rules_(rules) {
        const auto idx_bytes = size_t(idx_.size * idx_.itemsize);
        if (item_size != 2 && item_size != 4)
            throw std::invalid_argument("tokens must be uint16 or int32");
        if (idx_bytes < header_bytes || (idx_bytes - header_bytes) / 12 < sequences)
            throw std::invalid_argument("the .idx is shorter than its sequences");
        if (sample_index_.ndim() != 2 || sample_index_.shape(1) != 2 ||
            shuffle_index_.ndim() != 1 || sample_index_.shape(0) != shuffle_index_.shape(0) + 1)
            throw std::invalid_argument("sample_index and shuffle_index do not fit");
        if (rules.seq_length < 1 || (rules.extra != 0 && rules.extra != 1))
            throw std::invalid_argument("bad sequence length");
        const char* const lengths = static_cast<const char*>(idx_.ptr) + header_bytes;
        source_ = {{static_cast<const char*>(bin_.ptr), size_t(bin_.size * bin_.itemsize)},
                   lengths,
                   lengths + 4 * sequences,
                   sequences,
                   item_size};
        wide_rows_ = is<int64_t>(sample_index_);
        wide_order_ = is<int64_t>(shuffle_index_);
        if ((!wide_rows_ && !is<int32_t>(sample_index_)) ||
            (!wide_order_ && !is<uint32_t>(shuffle_index_)))
            throw std::invalid_argument("sample_index or shuffle_index has another dtype");
    }

    py::tuple read(int64_t i) {
        if (i < 0 || i >= shuffle_index_.shape(0))
            throw py::index_error("sample " + std::to_string(i));
        const int64_t k = wide_order_
                              ? static_cast<const int64_t*>(shuffle_index_.data())[i]
                              : int64_t(static_cast<const uint32_t*>(shuffle_index_.data())[i]);
        if (k < 0 || k >= shuffle_index_.shape(0))
            throw std::out_of_range("shuffle_index leads outside");
        const py::ssize_t length = rules_.seq_length;
        py::array_t<int64_t> tokens(length), labels(length), positions(length);
        py::array_t<float> mask(length);
        fastllm::read_sample(source_, document_index_.data(), size_t(document_index_.size()),
                             row(k), row(k + 1), rules_,
                             {tokens.mutable_data(), labels.mutable_data(), mask.mutable_data(),
                              positions.mutable_data(), &boundaries_});
        if (!rules_.packed)
            return py::make_tuple(std::move(tokens), std::move(labels), std::move(mask),
                                  std::move(positions));
        return py::make_tuple(
            std::move(tokens), std::move(labels), std::move(mask), std::move(positions),
            py::array_t<int32_t>(static_cast<py::ssize_t>(boundaries_.size()), boundaries_.data()));
    }

  private:
    template <class T>
    static bool is(const py::array& array) {
        return py::isinstance<py::array_t<T, py::array::c_style>>(array);
    }
    fastllm::SamplePoint row(int64_t k) const {
        if (wide_rows_) {
            const auto* const rows = static_cast<const int64_t*>(sample_index_.data());
            return {rows[2 * k], rows[2 * k + 1]};
        }
        const auto* const rows = static_cast<const int32_t*>(sample_index_.data());
        return {rows[2 * k], rows[2 * k + 1]};
    }

    py::buffer_info idx_, bin_;
    Array<int32_t> document_index_;
    py::array sample_index_, shuffle_index_;
    bool wide_rows_ = false, wide_order_ = false;
    fastllm::SampleRules rules_;
    fastllm::SampleSource source_{};
    std::vector<int32_t> boundaries_;  // of the item being read; the GIL guards it
};

}  // namespace

FASTLLM_BINDING(gpt_index) {
    py::class_<SampleReader>(m, "SampleReader")
        .def(py::init([](const py::buffer& idx, const py::buffer& bin, size_t header_bytes,
                         size_t sequences, size_t item_size, Array<int32_t> document_index,
                         py::array sample_index, py::array shuffle_index, int64_t seq_length,
                         int extra, int64_t pad_id, int64_t eod_id, bool eod_mask_loss,
                         bool reset_position_ids, bool packed) {
                 const fastllm::SampleRules rules{
                     seq_length, extra, pad_id, eod_id, eod_mask_loss, reset_position_ids, packed};
                 return std::make_unique<SampleReader>(
                     idx, bin, header_bytes, sequences, item_size, std::move(document_index),
                     std::move(sample_index), std::move(shuffle_index), rules);
             }),
             py::kw_only(), py::arg("idx"), py::arg("bin"), py::arg("header_bytes"),
             py::arg("sequences"), py::arg("item_size"), py::arg("document_index"),
             py::arg("sample_index"), py::arg("shuffle_index"), py::arg("seq_length"),
             py::arg("extra"), py::arg("pad_id"), py::arg("eod_id"), py::arg("eod_mask_loss"),
             py::arg("reset_position_ids"), py::arg("packed"))
        .def("read", &SampleReader::read);
    m.def("count_tokens", &count_tokens, py::arg("lengths"), py::arg("documents"));
    m.def("gpt_indices", &gpt_indices, py::kw_only(), py::arg("lengths"), py::arg("documents"),
          py::arg("epochs"), py::arg("separate"), py::arg("seq_length"), py::arg("extra"),
          py::arg("samples"), py::arg("first_part"), py::arg("seed"));
    m.def("blend", &blend, py::arg("weights"), py::arg("samples"), py::arg("threads") = py::none());
    m.def("exhaustive_blend", &exhaustive_blend, py::arg("sizes"), py::arg("threads") = py::none());
}
