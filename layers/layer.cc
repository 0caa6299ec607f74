#include "layers/layer.h"

#include <algorithm>
#include <unordered_set>

#include "core/random.h"
#include "layers/layer_execution.h"
#include "optim/update_parameters.h"

namespace calotype {

Layer::Layer(std::string_view type) : type_(type) {}
Layer::~Layer() = default;

// ---------------------------------------------------------------- the tree

void Layer::AddParameter(std::string name, const Shape& shape, Initializer initializer) {
  for (const Declaration& other : parameters_) {
    Check<InternalError>(other.name != name, "{}: parameter '{}' is declared twice", type_, name);
  }
  parameters_.push_back({std::move(name), shape, initializer, nullptr, false});
}

void Layer::Attach(std::string name, std::unique_ptr<Layer> layer) {
  for (const auto& other : layers_) {
    Check<InternalError>(other->name_ != name, "{}: sub-layer '{}' is declared twice", type_, name);
  }
  layer->parent_ = this;
  layer->name_ = std::move(name);
  layer->SetPath(path_.empty() ? layer->name_ : path_ + "." + layer->name_);
  layers_.push_back(std::move(layer));
}

void Layer::RemoveLayer(const Layer* layer) {
  size_t removed = std::erase_if(layers_, [&](const auto& other) { return other.get() == layer; });
  Check<InternalError>(removed == 1, "{}: the sub-layer to remove is not there", Describe());
  Changed();
}

void Layer::SetPath(const std::string& path) {
  path_ = path;
  for (Declaration& declaration : parameters_) {
    if (declaration.parameter) declaration.parameter->set_name(PathOf(declaration));
  }
  for (const auto& layer : layers_) layer->SetPath(path + "." + layer->name_);
}

std::string Layer::PathOf(const Declaration& declaration) const {
  return path_.empty() ? declaration.name : path_ + "." + declaration.name;
}

template <class Self, class F>
void Layer::Visit(Self& layer, const F& visit) {
  for (auto& declaration : layer.parameters_) visit(layer, declaration);
  for (const auto& child : layer.layers_) Visit(static_cast<Self&>(*child), visit);
}

std::string Layer::Describe() const {
  return path_.empty() ? std::string(type_) : fmt::format("{} '{}'", type_, path_);
}

void Layer::SetTrainingMode(bool training) {
  training_ = training;
  for (const auto& layer : layers_) layer->SetTrainingMode(training);
}

void Layer::SetRecompute(bool recompute) {
  recompute_ = recompute;
  Changed();
}

uint64_t Layer::Revision() const {
  uint64_t key = 1469598103934665603u;
  auto add = [&](const Layer& layer, const auto& self) -> void {
    key = (key ^ layer.revision_) * 1099511628211u;
    for (const auto& child : layer.layers_) self(*child, self);
  };
  add(*this, add);
  return key;
}

uint64_t Layer::StateKey() const {
  uint64_t key = Revision();
  auto add = [&](uint64_t value) { key = (key ^ value) * 1099511628211u; };
  Visit(*this, [&](const Layer&, const Declaration& declaration) {
    add(declaration.parameter ? declaration.parameter->trainable() : declaration.trainable);
  });
  auto add_layer = [&](const Layer& layer, const auto& self) -> void {
    add(layer.training_);
    for (const auto& child : layer.layers_) self(*child, self);
  };
  add_layer(*this, add_layer);
  return key;
}

// ---------------------------------------------------------------- values

// Gives a declaration its first storage.
void Layer::Store(Declaration& declaration, Tensor value) {
  declaration.parameter =
      std::make_shared<Parameter>(PathOf(declaration), std::move(value), declaration.trainable);
}

Parameter& Layer::Storage(Declaration& declaration) {
  if (!declaration.parameter) Store(declaration, Tensor(declaration.shape));
  return *declaration.parameter;
}

void Layer::Draw(Declaration& declaration, uint64_t seed) {
  Tensor& value = Storage(declaration).Write();
  Random random(seed, PathOf(declaration));
  float scale = declaration.initializer.scale;
  switch (declaration.initializer.kind) {
    case Initializer::Kind::kConstant:
      std::ranges::fill(value.values(), scale);
      break;
    case Initializer::Kind::kUniform:
      value.CopyFrom(random.UniformTensor(declaration.shape, -scale, scale));
      break;
    case Initializer::Kind::kNormal:
      value.CopyFrom(random.NormalTensor(declaration.shape));
      for (float& x : value.values()) x *= scale;
      break;
  }
  declaration.has_value = true;
}

void Layer::EnsureValue(Declaration& declaration) {
  if (declaration.has_value) return;
  Check(!declaration.released, "{}: the value of {} has been released; load it again", Describe(),
        declaration.name);
  Draw(declaration, 0);
}

void Layer::Initialize(uint64_t seed) {
  Visit(*this, [&](Layer& layer, Declaration& declaration) { layer.Draw(declaration, seed); });
}

std::vector<ParameterPtr> Layer::NamedParameters() {
  std::vector<ParameterPtr> parameters;
  Visit(*this, [&](Layer& layer, Declaration& declaration) {
    layer.EnsureValue(declaration);
    parameters.push_back(declaration.parameter);
  });
  return parameters;
}

ParameterPtr Layer::FindParameter(std::string_view path) {
  std::string_view last = path.substr(path.rfind('.') + 1);
  ParameterPtr found;
  std::string close;
  size_t skip = path_.empty() ? 0 : path_.size() + 1;
  Visit(*this, [&](Layer& layer, Declaration& declaration) {
    std::string candidate = layer.PathOf(declaration).substr(skip);
    if (candidate == path) {
      layer.EnsureValue(declaration);
      found = declaration.parameter;
    } else if (declaration.name == last && close.size() < 400) {
      close += (close.empty() ? "" : ", ") + candidate;
    }
  });
  Check(found != nullptr, "{}: there is no parameter '{}'{}{}", Describe(), path,
        close.empty() ? "" : "; of that name there are: ", close);
  return found;
}

std::vector<std::pair<std::string, Shape>> Layer::ParameterShapes() const {
  std::vector<std::pair<std::string, Shape>> shapes;
  Visit(*this, [&](const Layer& layer, const Declaration& declaration) {
    shapes.emplace_back(layer.PathOf(declaration), declaration.shape);
  });
  return shapes;
}

int64_t Layer::ParameterCount() const {
  int64_t count = 0;
  Visit(*this, [&](const Layer&, const Declaration& declaration) {
    count += declaration.shape.elements();
  });
  return count;
}

Tensor Layer::GetParameters() {
  Tensor values({ParameterCount()});
  float* out = values.data();
  for (const ParameterPtr& parameter : NamedParameters()) {
    out = std::ranges::copy(parameter->value().values(), out).out;
  }
  return values;
}

void Layer::SetParameters(const Tensor& values) {
  Check<ShapeError>(values.defined() && values.elements() == ParameterCount(),
                    "{}: SetParameters needs {} values, got {}", Describe(), ParameterCount(),
                    values.defined() ? values.elements() : 0);
  const float* from = values.data();
  Visit(*this, [&](Layer& layer, Declaration& declaration) {
    Tensor& value = layer.Storage(declaration).Write();
    std::copy_n(from, value.elements(), value.data());
    from += value.elements();
    declaration.has_value = true;
  });
}

Tensor Layer::GetParameterGradients() {
  Tensor gradients = Tensor::Zeros({ParameterCount()});
  float* out = gradients.data();
  for (const ParameterPtr& parameter : NamedParameters()) {
    if (parameter->trainable()) {
      Check(parameter->gradient.defined(), "{}: parameter '{}' has no gradient; run Backward first",
            Describe(), parameter->name());
      std::ranges::copy(std::as_const(parameter->gradient).values(), out);
    }
    out += parameter->value().elements();
  }
  return gradients;
}

void Layer::UpdateParameters(float learning_rate) {
  calotype::UpdateParameters(NamedParameters(), learning_rate);
}

void Layer::ReleaseParameters() {
  ResetState();
  // Cached graphs of the layers around this one refer to the same parameters.
  for (Layer* layer = parent_; layer; layer = layer->parent_) layer->execution_.reset();
  Visit(*this, [](Layer&, Declaration& declaration) {
    if (declaration.parameter) declaration.trainable = declaration.parameter->trainable();
    declaration.parameter.reset();
    declaration.has_value = false;
    declaration.released = true;
  });
}

void Layer::ResetState() {
  execution_.reset();
  Visit(*this, [](Layer&, Declaration& declaration) {
    if (declaration.parameter) declaration.parameter->gradient = Tensor();
  });
  for (const auto& layer : layers_) layer->ResetState();
}

// ---------------------------------------------------------------- load and save

std::string LoadReport::ToString() const {
  std::string text;
  auto group = [&](std::string_view title, const std::vector<std::string>& names) {
    if (names.empty()) return;
    text += fmt::format("{}{} ({}):", text.empty() ? "" : "\n", title, names.size());
    for (const std::string& name : names) text += "\n  " + name;
  };
  group("missing", missing);
  group("unexpected", unexpected);
  group("wrong shape", wrong_shape);
  return text;
}

LoadReport Layer::CheckParameters(const std::map<std::string, Tensor>& tensors) const {
  LoadReport report;
  std::unordered_set<std::string> known;
  size_t skip = path_.empty() ? 0 : path_.size() + 1;
  Visit(*this, [&](const Layer& layer, const Declaration& declaration) {
    std::string path = layer.PathOf(declaration).substr(skip);
    known.insert(path);
    auto it = tensors.find(path);
    if (it == tensors.end()) {
      report.missing.push_back(path);
    } else if (it->second.shape() != declaration.shape) {
      report.wrong_shape.push_back(fmt::format("{}: the tensor has shape {}, the parameter {}",
                                               path, it->second.shape(), declaration.shape));
    } else if (it->second.dtype() != DType::kF32 && it->second.dtype() != DType::kF64) {
      report.wrong_shape.push_back(
          fmt::format("{}: the tensor is {}, the parameter f32", path, it->second.dtype()));
    } else {
      report.loaded.push_back(path);
    }
  });
  for (const auto& [name, tensor] : tensors) {
    if (!known.contains(name)) report.unexpected.push_back(name);
  }
  return report;
}

LoadReport Layer::LoadParameters(std::map<std::string, Tensor> tensors, bool strict) {
  LoadReport report = CheckParameters(tensors);
  Check(!strict || report.complete(), "{}: the tensors do not fit the layer\n{}", Describe(),
        report.ToString());
  // Loaded ones are in the order of Visit.
  std::vector<std::pair<Layer*, Declaration*>> fitting;
  size_t skip = path_.empty() ? 0 : path_.size() + 1;
  Visit(*this, [&](Layer& layer, Declaration& declaration) {
    const size_t next = fitting.size();
    if (next == report.loaded.size()) return;
    if (layer.PathOf(declaration).substr(skip) == report.loaded[next])
      fitting.emplace_back(&layer, &declaration);
  });
  for (auto [layer, declaration] : fitting) {
    Check(!declaration->parameter || declaration->parameter->value().defined(),
          "{}: compiled code released the value of {} after packing (release_weights), so load the "
          "tensors into a new layer, or call ReleaseParameters first",
          Describe(), declaration->name);
  }
  for (size_t i = 0; i < fitting.size(); ++i) {
    auto [layer, declaration] = fitting[i];
    Tensor source = std::move(tensors.at(report.loaded[i]));
    if (source.dtype() != DType::kF32) source = source.To(DType::kF32);
    if (!declaration->parameter && source.Unique()) {
      layer->Store(*declaration, std::move(source));
    } else {
      layer->Storage(*declaration).Write().CopyFrom(source);
    }
    declaration->has_value = true;
  }
  return report;
}

std::map<std::string, Tensor> Layer::SaveParameters() {
  std::map<std::string, Tensor> tensors;
  size_t skip = path_.empty() ? 0 : path_.size() + 1;
  for (const ParameterPtr& parameter : NamedParameters()) {
    tensors.emplace(parameter->name().substr(skip), parameter->value().Clone());
  }
  return tensors;
}

// ---------------------------------------------------------------- graphs

Value Layer::Leaf(ComputationGraph& graph, std::string_view name) {
  for (Declaration& declaration : parameters_) {
    if (declaration.name != name) continue;
    EnsureValue(declaration);
    return graph.ParameterLeaf(declaration.parameter);
  }
  Fail<InternalError>("{}: there is no own parameter '{}'", Describe(), name);
}

Value Layer::Required(std::span<const Value> inputs, size_t index, std::string_view name) const {
  Check<ShapeError>(index < inputs.size() && inputs[index].defined(),
                    "{}: input {} ({}) is missing", Describe(), index, name);
  return inputs[index];
}

Value Layer::Call(std::initializer_list<Value> inputs) {
  std::span<const Value> span(inputs.begin(), inputs.size());
  Value first = Required(span, 0, "first input");
  ComputationGraph::Label label(*first.graph, name_);
  ComputationGraph::Segment segment(*first.graph, recompute_ && training_);
  return ExportComputationGraph(*first.graph, span).at(0);
}

ComputationGraph Layer::Export(const std::vector<GraphInput>& inputs) {
  ComputationGraph graph;
  std::vector<Value> values;
  for (const GraphInput& input : inputs) values.push_back(graph.Input(input.name, input.type));
  std::vector<Value> outputs = ExportComputationGraph(graph, values);
  for (size_t i = 0; i < outputs.size(); ++i) {
    graph.Output(i == 0 ? "out" : fmt::format("out.{}", i), outputs[i]);
  }
  return graph;
}

// ---------------------------------------------------------------- eager execution

std::vector<Tensor> Layer::Forward(std::span<const Tensor> inputs) {
  if (!execution_) execution_ = std::make_unique<LayerExecution>();
  return execution_->Forward(*this, inputs);
}

Tensor Layer::Forward(const Tensor& input) { return Forward(std::span(&input, 1)).at(0); }

Tensor Layer::Forward(std::initializer_list<Tensor> inputs) {
  return Forward(std::span(inputs.begin(), inputs.size())).at(0);
}

std::vector<Tensor> Layer::Backward(const Tensor& output_gradient) {
  return Backward(std::span(&output_gradient, 1));
}

std::vector<Tensor> Layer::Backward(std::span<const Tensor> output_gradients) {
  Check(execution_ != nullptr, "{}: Backward needs a Forward in training mode before it",
        Describe());
  return execution_->Backward(*this, output_gradients);
}

std::map<std::string, std::string> Layer::GetDiagnostics() const {
  return {{"layer.type", std::string(type_)},
          {"layer.path", path_},
          {"layer.parameter_count", fmt::format("{}", ParameterCount())},
          {"layer.supports_training", SupportsTraining() ? "true" : "false"},
          {"layer.supports_jit_compilation", SupportsJitCompilation() ? "true" : "false"},
          {"layer.training", training_ ? "true" : "false"},
          {"layer.cached_graphs", fmt::format("{}", execution_ ? execution_->graphs() : 0)},
          {"layer.kept_bytes", fmt::format("{}", execution_ ? execution_->kept_bytes() : 0)}};
}

}  // namespace calotype
