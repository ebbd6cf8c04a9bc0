// Statements to instructions: names to rows, labels to positions, modifiers to handlers. What is
// not understood to the last modifier is refused by line.
#include <algorithm>
#include <cstdlib>

#include "ptx_machine.hpp"
#include "ptx_program.hpp"

namespace emulator::ptx {
namespace {

std::size_t round_up(std::size_t value, std::size_t to) { return (value + to - 1) / to * to; }

constexpr std::pair<std::string_view, Special> kSpecials[] = {
    {"%tid.x", Special::kTidX},
    {"%tid.y", Special::kTidY},
    {"%tid.z", Special::kTidZ},
    {"%ntid.x", Special::kNtidX},
    {"%ntid.y", Special::kNtidY},
    {"%ntid.z", Special::kNtidZ},
    {"%ctaid.x", Special::kCtaidX},
    {"%ctaid.y", Special::kCtaidY},
    {"%ctaid.z", Special::kCtaidZ},
    {"%nctaid.x", Special::kNctaidX},
    {"%nctaid.y", Special::kNctaidY},
    {"%nctaid.z", Special::kNctaidZ},
    {"%laneid", Special::kLane},
    {"%warpid", Special::kWarp},
    {"%nwarpid", Special::kWarps},
    {"%lanemask_eq", Special::kMaskEq},
    {"%lanemask_lt", Special::kMaskLt},
    {"%lanemask_le", Special::kMaskLe},
    {"%lanemask_gt", Special::kMaskGt},
    {"%lanemask_ge", Special::kMaskGe},
    {"%dynamic_smem_size", Special::kDynamicShared},
    {"%clock", Special::kZero},
    {"%clock64", Special::kZero},
    {"%globaltimer", Special::kZero},
    {"%smid", Special::kZero},
    // Every cluster is of one block.
    {"%cluster_ctaid.x", Special::kZero},
    {"%cluster_ctaid.y", Special::kZero},
    {"%cluster_ctaid.z", Special::kZero},
    {"%cluster_ctarank", Special::kZero},
    {"%is_explicit_cluster", Special::kZero},
    {"%clusterid.x", Special::kCtaidX},
    {"%clusterid.y", Special::kCtaidY},
    {"%clusterid.z", Special::kCtaidZ},
    {"%nclusterid.x", Special::kNctaidX},
    {"%nclusterid.y", Special::kNctaidY},
    {"%nclusterid.z", Special::kNctaidZ},
};

class Decoder final : public Decoding {
  public:
    Decoder(const Kernel& kernel, const Module& module) : kernel_(kernel), module_(module) {
        program_ = std::make_unique<Program>();
        program_->kernel = &kernel;
        for (const auto& [name, type] : kernel.registers) registers_[name] = new_row();
        lay_out_shared();
    }

    std::unique_ptr<Program> run() {
        std::uint32_t at = 0;
        for (const Statement& s : kernel_.statements) {
            if (s.is_label) {
                labels_[{s.scope, s.opcode}] = at;
            } else {
                ++at;
            }
        }
        for (const Statement& s : kernel_.statements) {
            if (!s.is_label) program_->code.push_back(one(s));
        }
        // A kernel whose text ends without one.
        static const Statement kReturn = [] {
            Statement s;
            s.opcode = "ret";
            return s;
        }();
        program_->code.push_back(one(kReturn));
        program_->rows = next_row_;
        program_->reached.assign(program_->code.size(), 0);
        return std::move(program_);
    }

    bool take(std::string_view modifier) override {
        const auto it = std::find(modifiers_.begin(), modifiers_.end(), modifier);
        if (it == modifiers_.end()) return false;
        modifiers_.erase(it);
        return true;
    }
    std::string take_any(std::initializer_list<std::string_view> modifiers) override {
        for (const std::string_view m : modifiers) {
            if (take(m)) return std::string(m);
        }
        return {};
    }
    bool next_type(Type& type) override {
        for (auto it = modifiers_.begin(); it != modifiers_.end(); ++it) {
            if (!parse_type(*it, type)) continue;
            modifiers_.erase(it);
            return true;
        }
        return false;
    }
    Type take_type() override {
        Type type;
        if (!next_type(type)) refuse();
        return type;
    }
    std::size_t operand_count() const override { return statement_->operands.size(); }
    const std::string& operand(std::size_t i) const override {
        if (i >= statement_->operands.size()) throw_unsupported();
        return statement_->operands[i];
    }

    Row destination(const std::string& name) override {
        if (name == "_") return scratch();
        const Row* row = find_register(name);
        if (row == nullptr) refuse();
        return *row;
    }

    Row source(const std::string& text) override {
        if (const Row* row = find_register(text)) return *row;
        for (const auto& [name, special] : kSpecials) {
            if (name == text) return special_row(special);
        }
        if (text == "WARP_SZ") return constant(32);
        if (text.rfind("%cluster_ncta", 0) == 0) return constant(1);
        std::uint64_t value = 0;
        if (number(text, value) || symbol(text, value)) return constant(value);
        refuse();
    }

    // "[%rd1+16]", "[name]".
    void address(const std::string& text, Instruction& out, std::size_t row) override {
        if (text.size() < 3 || text.front() != '[' || text.back() != ']') refuse();
        std::string base = text.substr(1, text.size() - 2);
        out.offset = 0;
        if (const std::size_t plus = base.find('+'); plus != base.npos) {
            out.offset = integer(base.substr(plus + 1));
            base.resize(plus);
        }
        while (!base.empty() && base.back() == ' ') base.pop_back();
        out.rows[row] = source(base);
    }

    std::int64_t integer(const std::string& text) override {
        std::uint64_t value = 0;
        if (!number(text, value)) refuse();
        return static_cast<std::int64_t>(value);
    }

    std::uint32_t label(const std::string& name) override {
        for (int scope = statement_->scope; scope >= 0;
             scope = kernel_.parent_scope[static_cast<std::size_t>(scope)]) {
            const auto it = labels_.find({scope, name});
            if (it != labels_.end()) return it->second;
        }
        refuse();
    }

  private:
    void throw_unsupported() const override {
        std::string text = statement_->opcode;
        for (std::size_t i = 0; i < statement_->operands.size(); ++i) {
            text += (i == 0 ? " " : ", ") + statement_->operands[i];
        }
        throw Unsupported(statement_->line, "not emulated: " + text);
    }

    Row new_row() {
        if (next_row_ >= kNoRow) throw Unsupported(0, "more than 65535 registers in a kernel");
        return static_cast<Row>(next_row_++);
    }

    Row scratch() {
        if (scratch_ == kNoRow) scratch_ = new_row();
        return scratch_;
    }

    Row constant(std::uint64_t value) {
        const auto [it, fresh] = constants_.try_emplace(value, kNoRow);
        if (fresh) {
            it->second = new_row();
            program_->constants.emplace_back(it->second, value);
        }
        return it->second;
    }

    Row special_row(Special special) {
        const auto [it, fresh] = special_rows_.try_emplace(special, kNoRow);
        if (fresh) {
            it->second = new_row();
            program_->specials.emplace_back(it->second, special);
        }
        return it->second;
    }

    const Row* find_register(const std::string& name) const {
        for (int scope = statement_->scope; scope >= 0;
             scope = kernel_.parent_scope[static_cast<std::size_t>(scope)]) {
            const auto it = registers_.find({scope, name});
            if (it != registers_.end()) return &it->second;
        }
        return nullptr;
    }

    static bool number(const std::string& text, std::uint64_t& value) {
        if (text.empty()) return false;
        char* end = nullptr;
        if (text.size() == 10 && text[0] == '0' && (text[1] == 'f' || text[1] == 'F')) {
            value = std::strtoull(text.c_str() + 2, &end, 16);
            return *end == '\0';
        }
        if (text.size() == 18 && text[0] == '0' && (text[1] == 'd' || text[1] == 'D')) {
            value = std::strtoull(text.c_str() + 2, &end, 16);
            return *end == '\0';
        }
        const bool negative = text[0] == '-';
        const char* digits = text.c_str() + (negative ? 1 : 0);
        if (*digits < '0' || *digits > '9') return false;
        value = std::strtoull(digits, &end, 0);
        if (*end == 'U') ++end;
        if (negative) value = ~value + 1;
        return *end == '\0';
    }

    // Addresses of variables, within their space.
    bool symbol(const std::string& name, std::uint64_t& value) const {
        const auto find = [&](const std::vector<Variable>& variables) {
            for (const Variable& v : variables) {
                if (v.name != name) continue;
                value = v.offset;
                return true;
            }
            return false;
        };
        if (const auto it = shared_offsets_.find(name); it != shared_offsets_.end()) {
            value = it->second;
            return true;
        }
        return find(kernel_.params) || find(kernel_.local) || find(module_.variables);
    }

    // Variables one after another with a gap that nothing may touch; dynamic memory at the end.
    void lay_out_shared() {
        constexpr std::size_t kGap = 16;
        std::size_t used = 0;
        std::size_t alignment = 16;
        for (const Variable& v : kernel_.shared) {
            if (v.dynamic) {
                alignment = std::max(alignment, v.alignment);
                program_->has_dynamic = true;
                continue;
            }
            used = round_up(used + kGap, v.alignment);
            shared_offsets_[v.name] = used;
            program_->shared.emplace_back(used, v.bytes);
            program_->shared_bytes += v.bytes;
            used += v.bytes;
        }
        // Swizzled tiles of sm_90 begin at multiples of 1024, where dynamic memory does, too.
        if (module_.architecture >= 90) alignment = std::max<std::size_t>(alignment, 1024);
        program_->dynamic_offset = round_up(used + kGap, alignment);
        for (const Variable& v : kernel_.shared) {
            if (v.dynamic) shared_offsets_[v.name] = program_->dynamic_offset;
        }
    }

    Instruction one(const Statement& s) {
        statement_ = &s;
        Instruction out;
        out.line = s.line;
        out.text = &s.opcode;
        modifiers_.clear();
        std::size_t begin = s.opcode.find('.');
        const std::string opcode = s.opcode.substr(0, begin);
        while (begin != std::string::npos) {
            const std::size_t end = s.opcode.find('.', begin + 1);
            modifiers_.push_back(s.opcode.substr(begin + 1, end - begin - 1));
            begin = end;
        }
        const bool known =
            decode_arithmetic(opcode, *this, out) || decode_bits(opcode, *this, out) ||
            decode_move(opcode, *this, out) || decode_conversion(opcode, *this, out) ||
            decode_memory(opcode, *this, out) || decode_async_copy(opcode, *this, out) ||
            decode_warp(opcode, *this, out) || decode_matrix(opcode, *this, out) ||
            decode_mbarrier(opcode, *this, out) || decode_cluster(opcode, *this, out) ||
            decode_map_update(opcode, *this, out) || decode_wgmma(opcode, *this, out);
        if (!known || !modifiers_.empty()) refuse();
        if (!s.guard.empty()) {
            out.guard = source(s.guard);
            out.guard_negated = s.guard_negated;
        }
        return out;
    }

    const Kernel& kernel_;
    const Module& module_;
    std::unique_ptr<Program> program_;
    const Statement* statement_ = nullptr;
    std::vector<std::string> modifiers_;
    std::map<std::pair<int, std::string>, Row> registers_;
    std::map<std::pair<int, std::string>, std::uint32_t> labels_;
    std::map<std::string, std::size_t> shared_offsets_;
    std::map<std::uint64_t, Row> constants_;
    std::map<Special, Row> special_rows_;
    std::size_t next_row_ = 0;
    Row scratch_ = kNoRow;
};

}  // namespace

std::unique_ptr<Program> decode(const Kernel& kernel, const Module& module) {
    return Decoder(kernel, module).run();
}

}  // namespace emulator::ptx
