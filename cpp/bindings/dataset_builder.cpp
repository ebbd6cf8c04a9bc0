#include "fastllm/dataset_builder.hpp"

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "binding.hpp"
#include "fastllm/bytelevel_bpe.hpp"
#include "fastllm/error.hpp"
#include "fastllm/json.hpp"
#include "fastllm/sentencepiece_bpe.hpp"

namespace py = pybind11;
using fastllm::BuildCounts;
using fastllm::BuildOptions;
using fastllm::DatasetBuilder;
using fastllm::DatasetPosition;
using fastllm::Encoder;
using fastllm::EncoderThread;
using fastllm::IdBuffer;

namespace {

// The reference library as an encoder: calls a Python function with a list of texts and takes back
// one sequence of ids per text. Holds the GIL only while it does.
class PythonEncoder : public Encoder {
  public:
    PythonEncoder(py::function encode, uint32_t vocab_size)
        : encode_(std::move(encode)), vocab_size_(vocab_size) {}
    // The last reference may be dropped by a thread without the GIL.
    ~PythonEncoder() override {
        const py::gil_scoped_acquire acquire;
        encode_.release().dec_ref();
    }

    class Thread : public EncoderThread {
      public:
        explicit Thread(const PythonEncoder& encoder) : encoder_(encoder) {}
        void encode(const std::vector<std::string_view>& texts, IdBuffer& ids,
                    std::vector<size_t>& ends) override {
            const py::gil_scoped_acquire acquire;
            py::list batch;
            for (const std::string_view text : texts)
                batch.append(py::str(text.data(), text.size()));
            const py::sequence results = encoder_.encode_(batch);
            if (results.size() != texts.size())
                throw std::runtime_error("the encoder returned a different number of texts");
            for (const py::handle result : results) {
                const auto sequence = py::reinterpret_borrow<py::sequence>(result);
                for (const py::handle item : sequence) {
                    const auto id = item.cast<uint32_t>();
                    if (id >= encoder_.vocab_size_)
                        throw std::runtime_error("an id exceeds the vocabulary");
                    ids.push_back(id);
                }
                ends.push_back(ids.size());
            }
        }

      private:
        const PythonEncoder& encoder_;
    };

    std::unique_ptr<EncoderThread> thread() const override {
        return std::make_unique<Thread>(*this);
    }
    uint32_t vocab_size() const override { return vocab_size_; }

  private:
    py::function encode_;
    uint32_t vocab_size_;
};

// An encoder as Python sees it.
struct PyEncoder {
    std::shared_ptr<const Encoder> encoder;

    py::array_t<uint32_t> encode(const std::string& text) const {
        const std::unique_ptr<EncoderThread> thread = encoder->thread();
        IdBuffer ids;
        std::vector<size_t> ends;
        {
            const py::gil_scoped_release release;
            thread->encode({text}, ids, ends);
        }
        return py::array_t<uint32_t>(static_cast<py::ssize_t>(ids.size()), ids.data());
    }

    py::list encode_batch(const std::vector<std::string>& texts) const {
        const std::unique_ptr<EncoderThread> thread = encoder->thread();
        IdBuffer ids;
        std::vector<size_t> ends;
        {
            const py::gil_scoped_release release;
            thread->encode({texts.begin(), texts.end()}, ids, ends);
        }
        // Lists, not arrays: this is for comparing encoders before a run, and importing numpy would
        // cost more than the comparison.
        py::list result;
        size_t begin = 0;
        for (const size_t end : ends) {
            py::list of_text(end - begin);
            for (size_t i = begin; i < end; ++i) of_text[i - begin] = ids[i];
            result.append(std::move(of_text));
            begin = end;
        }
        return result;
    }
};

py::dict counts_dict(const BuildCounts& counts) {
    py::dict d;
    d["lines"] = counts.lines;
    d["blank_lines"] = counts.blank_lines;
    d["bad_lines"] = counts.bad_lines;
    d["documents"] = counts.documents;
    d["empty_documents"] = counts.empty_documents;
    d["text_bytes"] = counts.text_bytes;
    d["tokens"] = counts.tokens;
    d["input_bytes"] = counts.input_bytes;
    return d;
}

fastllm::EmptyDocument empty_document(const std::string& name) {
    if (name == "boundary") return fastllm::EmptyDocument::boundary;
    if (name == "skip") return fastllm::EmptyDocument::skip;
    if (name == "eod") return fastllm::EmptyDocument::eod;
    throw std::invalid_argument("empty_document: boundary, skip or eod");
}

using Targets = std::vector<std::pair<std::string, std::string>>;  // .bin and .idx of each key
using Positions = std::vector<std::tuple<uint64_t, uint64_t, uint64_t>>;

std::unique_ptr<DatasetBuilder> make_builder(
    const PyEncoder& encoder, const std::vector<std::string>& keys, const Targets& targets,
    const std::string& format, std::optional<uint32_t> eod_id, std::optional<uint32_t> bos_id,
    bool append_eod, const std::string& empty, bool int32, bool stop_on_error, unsigned workers,
    size_t block_bytes, const std::optional<Positions>& resume_at, py::object on_bad_line,
    py::object on_written) {
    BuildOptions options;
    options.keys = keys;
    options.format = format == "text" ? fastllm::LineFormat::text : fastllm::LineFormat::json;
    options.append_eod = append_eod;
    options.add_bos = bos_id.has_value();
    options.eod_id = eod_id.value_or(0);
    options.bos_id = bos_id.value_or(0);
    options.empty = empty_document(empty);
    if (!eod_id && (append_eod || options.empty == fastllm::EmptyDocument::eod))
        throw std::invalid_argument("eod_id is needed");
    options.type = int32 ? fastllm::TokenType::int32 : fastllm::TokenType::uint16;
    options.stop_on_error = stop_on_error;
    options.workers = workers;
    options.block_bytes = std::max<size_t>(block_bytes, 1);
    if (targets.size() != keys.size() || (resume_at && resume_at->size() != keys.size()))
        throw std::invalid_argument("one target per key");
    std::vector<std::unique_ptr<fastllm::IndexedDatasetWriter>> writers;
    for (size_t k = 0; k < targets.size(); ++k) {
        DatasetPosition position;
        if (resume_at)
            std::tie(position.tokens, position.sequences, position.documents) = (*resume_at)[k];
        writers.push_back(std::make_unique<fastllm::IndexedDatasetWriter>(
            targets[k].first, targets[k].second, options.type, resume_at ? &position : nullptr));
    }
    fastllm::BuildObserver observer;
    if (!on_bad_line.is_none())
        observer.bad_line = [on_bad_line](const fastllm::BadLine& bad) {
            const py::gil_scoped_acquire acquire;
            on_bad_line(bad.source, bad.line, bad.message, py::bytes(bad.raw));
        };
    const auto check_signals = [] {
        const py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    };
    observer.waiting = check_signals;
    observer.written = [on_written, check_signals](const BuildCounts& counts) {
        if (on_written.is_none()) return check_signals();
        const py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        on_written(counts_dict(counts));
    };
    return std::make_unique<DatasetBuilder>(options, encoder.encoder, std::move(writers),
                                            std::move(observer));
}

// Worker threads may be waiting for the GIL, so they are joined without it; the callbacks are
// Python objects, so they are dropped with it.
struct BuilderDeleter {
    void operator()(DatasetBuilder* builder) const {
        {
            const py::gil_scoped_release release;
            builder->stop();
        }
        delete builder;
    }
};

template <std::vector<DatasetPosition> (DatasetBuilder::*method)()>
Positions positions_after(DatasetBuilder& builder) {
    std::vector<DatasetPosition> positions;
    {
        const py::gil_scoped_release release;
        positions = (builder.*method)();
    }
    Positions result;
    for (const auto& at : positions) result.emplace_back(at.tokens, at.sequences, at.documents);
    return result;
}

void bind_encoders(py::module_& m) {
    py::class_<PyEncoder>(m, "Encoder")
        .def("encode", &PyEncoder::encode)
        .def("encode_batch", &PyEncoder::encode_batch)
        .def_property_readonly("vocab_size",
                               [](const PyEncoder& self) { return self.encoder->vocab_size(); });
    m.def("python_encoder", [](py::function encode, uint32_t vocab_size) {
        return PyEncoder{std::make_shared<PythonEncoder>(std::move(encode), vocab_size)};
    });
    m.def("sentencepiece_encoder", [](const std::string& model_bytes) {
        const py::gil_scoped_release release;
        return PyEncoder{std::make_shared<fastllm::SentencePieceBpe>(
            fastllm::SentencePieceModel::parse(model_bytes))};
    });
    m.def("sentencepiece_info", [](const std::string& model_bytes) {
        const auto model = fastllm::SentencePieceModel::parse(model_bytes);
        py::dict info;
        info["vocab_size"] = model.pieces.size();
        info["unk_id"] = model.find(model.unk_piece);
        info["bos_id"] = model.find(model.bos_piece);
        info["eos_id"] = model.find(model.eos_piece);
        info["algorithm"] = model.algorithm;
        info["unsupported"] = fastllm::SentencePieceBpe::unsupported(model);
        return info;
    });
}

PyEncoder bytelevel_encoder(std::vector<std::string> tokens,
                            std::optional<std::vector<std::pair<uint32_t, uint32_t>>> merges,
                            bool ignore_merges, const std::string& pattern,
                            std::vector<std::pair<std::string, uint32_t>> special) {
    const auto pretokenizer = fastllm::Pretokenizer::from_regex(pattern);
    if (!pretokenizer)
        throw fastllm::InputError("the pre-tokenizer's expression is not one of the known ones");
    fastllm::ByteLevelModel model;
    model.tokens = std::move(tokens);
    model.merges_by_rank = !merges.has_value();
    if (merges) model.merges = std::move(*merges);
    model.ignore_merges = ignore_merges;
    model.pretokenizer = *pretokenizer;
    model.special = std::move(special);
    const py::gil_scoped_release release;
    return {std::make_shared<fastllm::ByteLevelBpe>(std::move(model))};
}

// The pieces that an expression cuts a text into, for tests of the scanners.
py::list pretokenize(const std::string& pattern, const std::string& text) {
    const auto pretokenizer = fastllm::Pretokenizer::from_regex(pattern);
    if (!pretokenizer)
        throw fastllm::InputError("the pre-tokenizer's expression is not one of the known ones");
    const std::string padded = text + std::string(fastllm::Pretokenizer::kReadable, '\0');
    const auto* p = reinterpret_cast<const uint8_t*>(padded.data());
    const uint8_t* const end = p + text.size();
    py::list pieces;
    while (p < end) {
        const uint8_t* const next = pretokenizer->next(p, end);
        pieces.append(py::str(reinterpret_cast<const char*>(p), size_t(next - p)));
        p = next;
    }
    return pieces;
}

// What the builder sees in one line: for tests of the JSON parser, and for samples of inputs. Texts
// are cut off after `limit` bytes.
py::list parse_json_line(const py::bytes& line, const std::vector<std::string>& keys,
                         size_t limit) {
    const std::string_view view = line;
    fastllm::JsonLine parser(keys);
    parser.parse(view.data(), view.data() + view.size());
    py::list result;
    for (const fastllm::JsonField& field : parser.fields()) {
        py::list texts;
        for (const std::string_view text : field.texts)
            texts.append(py::bytes(text.data(), std::min(text.size(), limit)));
        const char* const kinds[] = {"missing", "text", "list", "other"};
        result.append(py::make_tuple(kinds[int(field.kind)], texts, field.lone_surrogate));
    }
    return result;
}

}  // namespace

FASTLLM_BINDING(dataset_builder) {
    py::register_exception<fastllm::InputError>(m, "InputError", PyExc_ValueError);
    py::register_exception<fastllm::JsonError>(m, "JsonError", PyExc_ValueError);
    bind_encoders(m);
    m.def("bytelevel_encoder", &bytelevel_encoder, py::kw_only(), py::arg("tokens"),
          py::arg("merges"), py::arg("ignore_merges"), py::arg("pattern"), py::arg("special"));
    m.def("pretokenize", &pretokenize);
    m.def("parse_json_line", &parse_json_line, py::arg("line"), py::arg("keys"),
          py::arg("limit") = ~size_t(0));
    using Holder = std::unique_ptr<DatasetBuilder, BuilderDeleter>;
    const auto nogil = py::call_guard<py::gil_scoped_release>();
    py::class_<DatasetBuilder, Holder>(m, "DatasetBuilder")
        .def(py::init([](const PyEncoder& encoder, const std::vector<std::string>& keys,
                         const Targets& targets, const std::string& format,
                         std::optional<uint32_t> eod_id, std::optional<uint32_t> bos_id,
                         bool append_eod, const std::string& empty, bool int32, bool stop_on_error,
                         unsigned workers, size_t block_bytes,
                         const std::optional<Positions>& resume_at, py::object on_bad_line,
                         py::object on_written) {
                 return Holder(make_builder(encoder, keys, targets, format, eod_id, bos_id,
                                            append_eod, empty, int32, stop_on_error, workers,
                                            block_bytes, resume_at, std::move(on_bad_line),
                                            std::move(on_written))
                                   .release());
             }),
             py::arg("encoder"), py::kw_only(), py::arg("keys"), py::arg("targets"),
             py::arg("format") = "json", py::arg("eod_id") = py::none(),
             py::arg("bos_id") = py::none(), py::arg("append_eod") = false,
             py::arg("empty_document") = "boundary", py::arg("int32") = false,
             py::arg("stop_on_error") = true, py::arg("workers") = 1,
             py::arg("block_bytes") = size_t(1) << 20, py::arg("resume_at") = py::none(),
             py::arg("on_bad_line") = py::none(), py::arg("on_written") = py::none())
        .def("add_file", &DatasetBuilder::add_file, py::arg("path"), py::arg("begin") = 0,
             py::arg("end") = ~0ull, py::arg("first_line") = 0, nogil)
        .def("begin_stream", &DatasetBuilder::begin_stream, py::arg("name"),
             py::arg("first_line") = 0, nogil)
        .def("feed",
             [](DatasetBuilder& self, const py::buffer& data) {
                 const py::buffer_info info = data.request();
                 if (info.ndim != 1 || info.itemsize != 1)
                     throw std::invalid_argument("feed takes bytes");
                 const py::gil_scoped_release release;
                 self.feed(static_cast<const char*>(info.ptr), size_t(info.size));
             })
        .def("end_stream", &DatasetBuilder::end_stream, nogil)
        .def("sync", &positions_after<&DatasetBuilder::sync>)
        .def("finish", &positions_after<&DatasetBuilder::finish>)
        .def("counts", [](const DatasetBuilder& self) { return counts_dict(self.counts()); })
        .def_property_readonly("lines_in_source", &DatasetBuilder::lines_in_source);
}
