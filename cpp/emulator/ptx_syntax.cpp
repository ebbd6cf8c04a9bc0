#include "ptx_syntax.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>

namespace emulator::ptx {
namespace {

bool is_name_char(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%' ||
           c == '.';
}

std::string_view trimmed(std::string_view s) {
    while (!s.empty() && std::isspace(static_cast<unsigned char>(s.front())) != 0)
        s.remove_prefix(1);
    while (!s.empty() && std::isspace(static_cast<unsigned char>(s.back())) != 0)
        s.remove_suffix(1);
    return s;
}

std::size_t round_up(std::size_t value, std::size_t to) { return (value + to - 1) / to * to; }

class Parser {
  public:
    explicit Parser(std::string_view text) : text_(text) {}

    void run(Module& module) {
        for (skip(); !at_end(); skip()) {
            const std::string_view word = next_word();
            if (word == ".target") {
                const std::string target(next_word());  // sm_80, sm_90a
                if (target.rfind("sm_", 0) != 0) refuse("target " + target);
                module.architecture = std::atoi(target.c_str() + 3);
                skip_line();
            } else if (word == ".version" || word == ".address_size" || word == ".file") {
                skip_line();
            } else if (word == ".visible" || word == ".weak" || word == ".extern" ||
                       word == ".common") {
                external_ = word == ".extern";
            } else if (word == ".entry") {
                entry(module);
            } else if (word == ".global" || word == ".const" || word == ".shared") {
                module_variable(module, word);
            } else if (word == ".func") {
                refuse("a function that is called, instead of inlined");
            } else {
                refuse("\"" + std::string(word) + "\" outside of a kernel");
            }
        }
        for (const auto& kernel : module.kernels) {
            kernel->shared.insert(kernel->shared.end(), shared_.begin(), shared_.end());
        }
    }

  private:
    [[noreturn]] void refuse(const std::string& what) const { throw Unsupported(line_, what); }
    bool at_end() const { return at_ >= text_.size(); }

    void advance() { line_ += text_[at_++] == '\n'; }

    void skip_line() {
        while (!at_end() && text_[at_] != '\n') advance();
    }

    // White space and comments.
    void skip() {
        while (!at_end()) {
            const std::string_view rest = text_.substr(at_, 2);
            if (rest == "//") {
                skip_line();
            } else if (rest == "/*") {
                while (!at_end() && text_.substr(at_, 2) != "*/") advance();
                at_ = std::min(text_.size(), at_ + 2);
            } else if (std::isspace(static_cast<unsigned char>(rest[0])) != 0 || rest[0] == '\0') {
                advance();
            } else {
                return;
            }
        }
    }

    char peek() {
        skip();
        if (at_end()) refuse("the text ends in the middle");
        return text_[at_];
    }

    void expect(char c) {
        if (peek() != c) refuse(std::string("no '") + c + "' but \"" + text_[at_] + "\"");
        advance();
    }

    bool take(char c) {
        if (peek() != c) return false;
        advance();
        return true;
    }

    std::string_view next_word() {
        peek();
        const std::size_t begin = at_;
        while (!at_end() && is_name_char(text_[at_])) ++at_;
        if (at_ == begin) refuse(std::string("unexpected '") + text_[at_] + "'");
        return text_.substr(begin, at_ - begin);
    }

    std::size_t next_number() {
        const std::string_view word = next_word();
        std::size_t value = 0;
        const auto done = std::from_chars(word.data(), word.data() + word.size(), value);
        if (done.ptr != word.data() + word.size()) refuse("no number: " + std::string(word));
        return value;
    }

    // Up to `end`, which is consumed. Comments within are taken out.
    std::string until(char end) {
        std::string out;
        for (skip(); peek() != end; skip()) {
            while (!at_end() && text_[at_] != end && text_.substr(at_, 2) != "//" &&
                   text_.substr(at_, 2) != "/*" && text_[at_] != '\n') {
                out += text_[at_];
                advance();
            }
            if (!at_end() && text_[at_] != end) out += ' ';
        }
        advance();
        return std::string(trimmed(out));
    }

    // ".align 4 .b8 name[128]" and what may follow up to the end of the declarator.
    Variable declarator(Space space) {
        Variable v;
        v.space = space;
        Type type;
        bool typed = false;
        for (;;) {
            const std::string_view word = next_word();
            if (word == ".align") {
                v.alignment = next_number();
            } else if (word == ".ptr" || word == ".global" || word == ".shared") {
                continue;  // what a pointer parameter points to
            } else if (word[0] == '.') {
                if (!parse_type(word.substr(1), type)) refuse("type " + std::string(word));
                typed = true;
            } else {
                v.name = word;
                break;
            }
        }
        if (!typed) refuse("a variable without a type");
        v.alignment = std::max<std::size_t>(v.alignment, static_cast<std::size_t>(type.bytes()));
        v.bytes = static_cast<std::size_t>(type.bytes());
        element_bytes_ = v.bytes;
        while (take('[')) {
            if (take(']')) {
                v.dynamic = true;
                v.bytes = 0;
                continue;
            }
            v.bytes *= next_number();
            expect(']');
        }
        return v;
    }

    void module_variable(Module& module, std::string_view space) {
        Variable v = declarator(space == ".shared" ? Space::kShared : Space::kGlobal);
        if (v.dynamic && v.space != Space::kShared) refuse("a variable without a size");
        const std::size_t element = element_bytes_;
        v.initial.assign(v.bytes, 0);
        if (take('=')) initialiser(v, element);
        expect(';');
        if (v.space == Space::kShared) {
            shared_.push_back(v);
        } else if (external_) {
            refuse("an external variable, " + v.name);
        } else {
            module.variables.push_back(v);
        }
        external_ = false;
    }

    void initialiser(Variable& v, std::size_t element) {
        const bool list = take('{');
        for (std::size_t at = 0; !list || peek() != '}'; at += element) {
            const bool negative = take('-');
            const std::string word(next_word());
            if (at + element > v.bytes) refuse("more initial values than " + v.name + " holds");
            std::uint64_t bits = 0;
            char* end = nullptr;
            if (word.size() > 2 && (word[1] == 'f' || word[1] == 'F' || word[1] == 'd')) {
                bits = std::strtoull(word.c_str() + 2, &end, 16);
            } else {
                bits = std::strtoull(word.c_str(), &end, 0);
            }
            if (*end != '\0' && *end != 'U') refuse("initial value " + word);
            if (negative) bits = ~bits + 1;
            for (std::size_t i = 0; i < element; ++i) {
                v.initial[at + i] = static_cast<unsigned char>(bits >> (8 * i));
            }
            if (!list) return;
            take(',');
        }
        expect('}');
    }

    void entry(Module& module) {
        external_ = false;
        auto kernel = std::make_unique<Kernel>();
        kernel->name = next_word();
        kernel->parent_scope = {-1};
        if (take('(')) {
            while (!take(')')) {
                if (next_word() != ".param") refuse("a parameter that is not .param");
                Variable v = declarator(Space::kParam);
                kernel->param_bytes = round_up(kernel->param_bytes, v.alignment);
                v.offset = kernel->param_bytes;
                kernel->param_bytes += v.bytes;
                kernel->params.push_back(v);
                take(',');
            }
        }
        while (peek() != '{') launch_bound(*kernel);
        expect('{');
        body(*kernel);
        module.kernels.push_back(std::move(kernel));
    }

    void launch_bound(Kernel& kernel) {
        const std::string word(next_word());
        unsigned product = 1;
        do {
            product *= static_cast<unsigned>(next_number());
        } while (take(','));
        if (word == ".maxntid") {
            kernel.max_threads = product;
        } else if (word == ".reqntid") {
            kernel.required_threads = product;
        } else if (word != ".minnctapersm" && word != ".maxnreg") {
            refuse(word);
        }
    }

    void body(Kernel& kernel) {
        std::vector<int> scopes = {0};
        while (!scopes.empty()) {
            const char c = peek();
            if (c == '{') {
                advance();
                kernel.parent_scope.push_back(scopes.back());
                scopes.push_back(static_cast<int>(kernel.parent_scope.size()) - 1);
            } else if (c == '}') {
                advance();
                scopes.pop_back();
            } else if (c == '.') {
                directive(kernel, scopes.back());
            } else if (c == ';') {
                advance();
            } else {
                statement(kernel, scopes.back());
            }
        }
    }

    void directive(Kernel& kernel, int scope) {
        const std::string word(next_word());
        if (word == ".reg") {
            registers(kernel, scope);
        } else if (word == ".shared" || word == ".local") {
            Variable v = declarator(word == ".shared" ? Space::kShared : Space::kLocal);
            expect(';');
            if (v.space == Space::kShared) {
                kernel.shared.push_back(v);
            } else {
                kernel.local_bytes = round_up(kernel.local_bytes, v.alignment);
                v.offset = kernel.local_bytes;
                kernel.local_bytes += v.bytes;
                kernel.local.push_back(v);
            }
        } else if (word == ".pragma") {
            until(';');
        } else if (word == ".loc") {
            skip_line();
        } else {
            refuse(word + " in a kernel");
        }
    }

    void registers(Kernel& kernel, int scope) {
        Type type;
        const std::string_view word = next_word();
        if (!parse_type(word.substr(1), type)) refuse("type " + std::string(word));
        for (const std::string& name : split_operands(until(';'))) {
            const std::size_t angle = name.find('<');
            if (angle == std::string::npos) {
                kernel.registers[{scope, name}] = type;
                continue;
            }
            const int count = std::atoi(name.c_str() + angle + 1);
            for (int i = 0; i < count; ++i) {
                kernel.registers[{scope, name.substr(0, angle) + std::to_string(i)}] = type;
            }
        }
    }

    void statement(Kernel& kernel, int scope) {
        Statement s;
        s.line = line_;
        s.scope = scope;
        if (take('@')) {
            s.guard_negated = take('!');
            s.guard = next_word();
        }
        s.opcode = next_word();
        while (text_.substr(at_, 2) == "::") {  // .shared::cta, .L1::no_allocate
            s.opcode += "::";
            at_ += 2;
            s.opcode += next_word();
        }
        if (s.guard.empty() && take(':')) {
            s.is_label = true;
        } else {
            s.operands = split_operands(until(';'));
        }
        kernel.statements.push_back(std::move(s));
    }

    std::string_view text_;
    std::size_t at_ = 0;
    int line_ = 1;
    bool external_ = false;
    std::size_t element_bytes_ = 0;
    std::vector<Variable> shared_;
};

}  // namespace

bool parse_type(std::string_view name, Type& type) {
    struct Named {
        std::string_view name;
        Type type;
    };
    static constexpr std::array<Named, 20> kTypes = {{
        {"b8", {'b', 8, false}},    {"b16", {'b', 16, false}},   {"b32", {'b', 32, false}},
        {"b64", {'b', 64, false}},  {"u8", {'u', 8, false}},     {"u16", {'u', 16, false}},
        {"u32", {'u', 32, false}},  {"u64", {'u', 64, false}},   {"s8", {'s', 8, false}},
        {"s16", {'s', 16, false}},  {"s32", {'s', 32, false}},   {"s64", {'s', 64, false}},
        {"f16", {'f', 16, false}},  {"f32", {'f', 32, false}},   {"f64", {'f', 64, false}},
        {"bf16", {'h', 16, false}}, {"f16x2", {'f', 16, true}},  {"bf16x2", {'h', 16, true}},
        {"pred", {'p', 8, false}},  {"b128", {'b', 128, false}},
    }};
    for (const Named& t : kTypes) {
        if (t.name == name) {
            type = t.type;
            return true;
        }
    }
    return false;
}

std::vector<std::string> split_operands(std::string_view text) {
    std::vector<std::string> out;
    int depth = 0;
    std::size_t begin = 0;
    for (std::size_t i = 0; i <= text.size(); ++i) {
        const char c = i < text.size() ? text[i] : ',';
        depth += (c == '{' || c == '[') - (c == '}' || c == ']');
        if (c != ',' || (depth > 0 && i < text.size())) continue;
        const std::string_view operand = trimmed(text.substr(begin, i - begin));
        if (!operand.empty()) out.emplace_back(operand);
        begin = i + 1;
    }
    return out;
}

std::unique_ptr<Module> parse(std::string_view text) {
    auto module = std::make_unique<Module>();
    module->text = text;
    Parser(module->text).run(*module);
    return module;
}

}  // namespace emulator::ptx
