#include "graph/text.h"

#include <charconv>
#include <map>
#include <optional>

#include "core/error.h"
#include "graph/op.h"

namespace calotype {

namespace {

std::string Reference(const ComputationGraph& graph, ValueId id) {
  if (graph.node(id.node).types.size() == 1) return fmt::format("%{}", id.node);
  return fmt::format("%{}.{}", id.node, id.output);
}

std::string ConstantText(const Tensor& x, int64_t max_constant) {
  if (x.elements() > max_constant) return fmt::format("[... {} values]", x.elements());
  switch (x.dtype()) {
    case DType::kF32:
      return fmt::format("[{}]", fmt::join(x.values<float>(), ", "));
    case DType::kF64:
      return fmt::format("[{}]", fmt::join(x.values<double>(), ", "));
    case DType::kI32:
      return fmt::format("[{}]", fmt::join(x.values<int32_t>(), ", "));
    case DType::kI64:
      return fmt::format("[{}]", fmt::join(x.values<int64_t>(), ", "));
  }
  return "";
}

// The whole of `word` as a number, or nothing.
template <class T>
std::optional<T> Whole(std::string_view word) {
  T value{};
  auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  if (error != std::errc() || end != word.data() + word.size()) return {};
  return value;
}

// Reads one line, token by token.
class Reader {
 public:
  Reader(std::string_view line, int number) : rest_(line), number_(number) {}

  void Expect(bool condition, std::string_view what) const {
    Check(condition, "graph text, line {}: expects {} before \"{}\"", number_, what, rest_);
  }
  void Space() {
    while (!rest_.empty() && rest_[0] == ' ') rest_.remove_prefix(1);
  }
  bool Take(std::string_view token) {
    Space();
    if (!rest_.starts_with(token)) return false;
    rest_.remove_prefix(token.size());
    return true;
  }
  void Need(std::string_view token) { Expect(Take(token), fmt::format("\"{}\"", token)); }
  std::string Quoted() {
    Need("\"");
    size_t end = rest_.find('"');
    Expect(end != std::string_view::npos, "a closing quote");
    std::string text(rest_.substr(0, end));
    rest_.remove_prefix(end + 1);
    return text;
  }
  // Characters up to one of `stops`.
  std::string Word(std::string_view stops) {
    Space();
    size_t end = std::min(rest_.find_first_of(stops), rest_.size());
    std::string word(rest_.substr(0, end));
    while (!word.empty() && word.back() == ' ') word.pop_back();
    Expect(!word.empty(), "a word");
    rest_.remove_prefix(end);
    return word;
  }
  int64_t Integer() {
    Space();
    int64_t value = 0;
    auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
    Expect(error == std::errc(), "an integer");
    rest_.remove_prefix(end - rest_.data());
    return value;
  }
  bool Done() {
    Space();
    return rest_.empty();
  }
  std::string_view rest() const { return rest_; }

  template <class F>
  void List(F item) {
    Need("[");
    if (Take("]")) return;
    do item();
    while (Take(","));
    Need("]");
  }
  std::vector<int64_t> Integers() {
    std::vector<int64_t> values;
    List([&] { values.push_back(Integer()); });
    return values;
  }
  TensorType Type() {
    static const std::map<std::string, DType> kTypes = {
        {"f32", DType::kF32}, {"f64", DType::kF64}, {"i32", DType::kI32}, {"i64", DType::kI64}};
    auto at = kTypes.find(Word("["));
    Expect(at != kTypes.end(), "a dtype (f32, f64, i32, i64)");
    return {at->second, Shape(Integers())};
  }
  AttrValue Attribute() {
    Space();
    if (rest_.starts_with('"')) return Quoted();
    if (rest_.starts_with('[')) return Integers();
    std::string word = Word(",}");
    if (auto integer = Whole<int64_t>(word)) return *integer;
    auto number = Whole<double>(word);
    Expect(number.has_value(), "an attribute value");
    return *number;
  }

 private:
  std::string_view rest_;
  int number_;
};

Tensor ReadConstant(Reader& line, int64_t limit) {
  std::vector<double> values;
  std::vector<int64_t> integers;
  line.List([&] {
    line.Space();
    line.Expect(!line.rest().starts_with("..."), "the values of the constant (they were left out)");
    line.Expect(static_cast<int64_t>(values.size()) < limit, "fewer values");
    std::string word = line.Word(",]");
    auto number = Whole<double>(word);
    line.Expect(number.has_value(), "a number");
    values.push_back(*number);
    integers.push_back(Whole<int64_t>(word).value_or(0));  // a double cannot hold every i64
  });
  line.Need(":");
  TensorType type = line.Type();
  line.Expect(static_cast<int64_t>(values.size()) == type.shape.elements(),
              "as many values as elements");
  if (type.dtype == DType::kI64) return Tensor::From(type.shape, integers);
  return Tensor::From(type.shape, values).To(type.dtype);
}

}  // namespace

std::string ToText(const ComputationGraph& graph, int64_t max_constant) {
  std::string text;
  for (size_t i = 0; i < graph.nodes().size(); ++i) {
    const ComputationNode& node = graph.nodes()[i];
    text += fmt::format("%{} = {}", i, node.op->name);
    if (node.op == &kInputOp) text += fmt::format(" \"{}\"", node.name);
    if (node.op == &kParameterOp) text += fmt::format(" \"{}\"", node.parameter->name());
    if (node.op == &kConstantOp) text += " " + ConstantText(node.constant, max_constant);
    if (node.op->kind != OpKind::kLeaf) {
      text += "(";
      for (size_t k = 0; k < node.inputs.size(); ++k) {
        text += (k ? ", " : "") + Reference(graph, node.inputs[k]);
      }
      text += ")";
      if (std::string attrs = node.attrs.ToString(); !attrs.empty()) text += " " + attrs;
    }
    text += " :";
    for (size_t o = 0; o < node.types.size(); ++o) {
      text += fmt::format("{} {}", o ? "," : "", node.types[o]);
    }
    if (const auto& label = graph.label_of(static_cast<int32_t>(i)); !label.empty()) {
      text += " @ " + label;
    }
    text += "\n";
  }
  for (const GraphOutput& output : graph.outputs()) {
    text += fmt::format("output \"{}\" = {}\n", output.name, Reference(graph, output.value));
  }
  for (const GraphUpdate& update : graph.updates()) {
    text += fmt::format("update {} = {}\n", Reference(graph, update.target),
                        Reference(graph, update.source));
  }
  return text;
}

ComputationGraph ParseText(std::string_view text) {
  ComputationGraph graph;
  std::map<int64_t, std::vector<Value>> values;
  int number = 0;
  while (!text.empty()) {
    size_t end = std::min(text.find('\n'), text.size());
    Reader line(text.substr(0, end), ++number);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.Done() || line.Take("#")) continue;

    auto value = [&] {
      line.Need("%");
      int64_t node = line.Integer();
      int64_t output = line.Take(".") ? line.Integer() : 0;
      auto at = values.find(node);
      line.Expect(
          at != values.end() && output >= 0 && output < static_cast<int64_t>(at->second.size()),
          fmt::format("a value that stands above (%{}.{} does not)", node, output));
      return at->second[output];
    };
    if (line.Take("output")) {
      std::string name = line.Quoted();
      line.Need("=");
      graph.Output(name, value());
      continue;
    }
    if (line.Take("update")) {
      Value target = value();
      line.Need("=");
      graph.Update(target, value());
      continue;
    }
    line.Need("%");
    int64_t index = line.Integer();
    line.Need("=");
    std::string op = line.Word(" (");
    // The label stands at the end of the line but must be set first.
    size_t at = line.rest().rfind(" @ ");
    graph.SetLabel(at == std::string_view::npos ? "" : std::string(line.rest().substr(at + 3)));
    if (op == "Input") {
      std::string name = line.Quoted();
      line.Need(":");
      values[index] = {graph.Input(name, line.Type())};
    } else if (op == "Parameter") {
      std::string name = line.Quoted();
      line.Need(":");
      TensorType type = line.Type();
      values[index] = {graph.ParameterLeaf(
          std::make_shared<Parameter>(name, Tensor::Zeros(type.shape, type.dtype)))};
    } else if (op == "Constant") {
      values[index] = {graph.Constant(ReadConstant(line, int64_t{1} << 24))};
    } else {
      std::vector<Value> inputs;
      line.Need("(");
      if (!line.Take(")")) {
        do inputs.push_back(value());
        while (line.Take(","));
        line.Need(")");
      }
      Attrs attrs;
      if (line.Take("{")) {
        do {
          std::string name = line.Word("=");
          line.Need("=");
          attrs.Set(name, line.Attribute());
        } while (line.Take(","));
        line.Need("}");
      }
      values[index] = graph.Emit(FindOp(op), inputs, attrs);
      line.Need(":");
      for (size_t o = 0; o < values[index].size(); ++o) {
        if (o) line.Need(",");
        line.Expect(line.Type() == values[index][o].type(),
                    fmt::format("the inferred type {}", values[index][o].type()));
      }
    }
  }
  graph.SetLabel("");
  return graph;
}

std::string ToDot(const ComputationGraph& graph) {
  std::map<std::string, std::vector<size_t>> clusters;
  for (size_t i = 0; i < graph.nodes().size(); ++i) {
    clusters[graph.label_of(static_cast<int32_t>(i))].push_back(i);
  }
  std::string text = "digraph calotype {\n  node [shape=box, fontname=\"monospace\"];\n";
  int number = 0;
  for (const auto& [label, members] : clusters) {
    if (!label.empty()) {
      text += fmt::format("  subgraph cluster_{} {{\n    label=\"{}\";\n", number++, label);
    }
    for (size_t i : members) {
      const ComputationNode& node = graph.nodes()[i];
      std::string name(node.op->name);
      if (node.op == &kInputOp) name = node.name;
      if (node.op == &kParameterOp) name = node.parameter->name();
      text += fmt::format("    n{} [label=\"{}\\n{}\"{}];\n", i, name, node.types[0],
                          node.op->kind == OpKind::kLeaf ? ", style=dashed" : "");
    }
    if (!label.empty()) text += "  }\n";
  }
  for (size_t i = 0; i < graph.nodes().size(); ++i) {
    for (ValueId id : graph.nodes()[i].inputs) text += fmt::format("  n{} -> n{};\n", id.node, i);
  }
  for (const GraphOutput& output : graph.outputs()) {
    text += fmt::format("  \"out {0}\" [shape=oval, label=\"{0}\"];\n  n{1} -> \"out {0}\";\n",
                        output.name, output.value.node);
  }
  return text + "}\n";
}

}  // namespace calotype
