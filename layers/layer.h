// Layer: the base of everything with parameters. A concrete layer is a constructor (declares
// parameters and sub-layers by name) and ExportComputationGraph (the formula, as graph nodes).
// Everything else is derived from these two: Forward interprets the exported graph, Backward
// interprets its gradient graph, the JIT compiles the same graphs, files load by path name. So the
// three cannot disagree.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/parameter.h"
#include "core/tensor.h"
#include "graph/graph.h"

namespace calotype {

class LayerExecution;

// How the first value of a parameter is drawn.
struct Initializer {
  enum class Kind : uint8_t { kConstant, kUniform, kNormal } kind = Kind::kConstant;
  float scale = 0;  // the constant; the bound of U(-scale, scale); the deviation of N(0, scale^2)

  static Initializer Constant(float value) { return {Kind::kConstant, value}; }
  static Initializer Uniform(float bound) { return {Kind::kUniform, bound}; }
  static Initializer Normal(float deviation) { return {Kind::kNormal, deviation}; }
};

// What LoadParameters did or would have to do, by parameter path.
struct LoadReport {
  std::vector<std::string> loaded;
  std::vector<std::string> missing;      // parameters without a tensor; they keep their values
  std::vector<std::string> unexpected;   // tensors without a parameter
  std::vector<std::string> wrong_shape;  // "path: the tensor has shape [..], the parameter [..]"

  bool complete() const { return missing.empty() && unexpected.empty() && wrong_shape.empty(); }
  std::string ToString() const;  // all problems, grouped, one a line
};

// Names and types of the inputs of an exported graph, in the order of the layer's inputs.
struct GraphInput {
  std::string name;
  TensorType type;
};

class Layer {
 public:
  virtual ~Layer();
  Layer(const Layer&) = delete;  // sub-layers and cached graphs refer to the layer
  Layer& operator=(const Layer&) = delete;

  // The formula. `inputs` are the layer's inputs in their documented order; an optional input may
  // be undefined, or missing at the end. Emits nodes, executes nothing. Errors: ShapeError if the
  // inputs do not fit, naming the layer's path. (Sub-layers are called through Call, which labels
  // their nodes.)
  virtual std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                                    std::span<const Value> inputs) = 0;
  // The first result, inside a label with the layer's name: how layers call their sub-layers.
  Value Call(std::initializer_list<Value> inputs);
  Value Call(Value input) { return Call({input}); }
  // A graph of its own with these inputs; its outputs are named "out", "out.1", ...
  ComputationGraph Export(const std::vector<GraphInput>& inputs);

  // Eager execution. The graph is exported once for each combination of input types (the latest 8
  // are kept) and interpreted. The span form returns all outputs, the others the first; undefined
  // tensors stand for absent optional inputs. In training mode (the default) the values that the
  // gradient reads are kept until the next Forward or ResetState; inputs and outputs must not be
  // overwritten before Backward. Parameters without a value are drawn first, as by Initialize(0).
  std::vector<Tensor> Forward(std::span<const Tensor> inputs);
  Tensor Forward(const Tensor& input);
  Tensor Forward(std::initializer_list<Tensor> inputs);

  // Gradients of sum over outputs of <output_gradient, output> for the inputs of the last Forward;
  // undefined for absent and integer inputs. Writes (does not add to) Parameter::gradient of every
  // trainable parameter; zero where a parameter is not used. An undefined output gradient means
  // zero. Errors: ValueError without a Forward in training mode before, or if a parameter was
  // changed since; ShapeError if a gradient does not fit its output.
  std::vector<Tensor> Backward(const Tensor& output_gradient);
  std::vector<Tensor> Backward(std::span<const Tensor> output_gradients);

  // Plain gradient descent: value -= learning_rate * gradient for every trainable parameter.
  // Errors: ValueError if there is no gradient, naming the parameter.
  void UpdateParameters(float learning_rate);
  // Forgets the values kept for Backward and all gradients.
  virtual void ResetState();

  // Draws every parameter from its initial distribution. The numbers depend on the seed and the
  // path of the parameter alone, not on the order of construction.
  void Initialize(uint64_t seed);

  // All parameters in declaration order, a layer's own before those of its sub-layers; values are
  // drawn as by Initialize(0) where there are none yet. Names are paths:
  // "down_blocks.0.resnets.0.conv1.weight".
  std::vector<ParameterPtr> NamedParameters();
  // The parameter of that path, counted from this layer. Errors: ValueError listing close names.
  ParameterPtr FindParameter(std::string_view path);
  // Paths and shapes; needs no storage for values.
  std::vector<std::pair<std::string, Shape>> ParameterShapes() const;
  int64_t ParameterCount() const;  // number of elements

  // All values in declaration order as one f32 vector. SetParameters: ShapeError for a wrong
  // length.
  Tensor GetParameters();
  void SetParameters(const Tensor& values);
  // The same for gradients; zeros for parameters that are not trainable.
  // Errors: ValueError if Backward has not run.
  Tensor GetParameterGradients();

  // Copies tensors (f32 or f64) into the parameters of the same path. With `strict`, any problem is
  // one ValueError that lists them all, and nothing is changed; otherwise what fits is loaded. An
  // f32 tensor that nobody else holds (move the map in) becomes the storage of a parameter that has
  // none yet, so that large models are not held twice.
  LoadReport LoadParameters(std::map<std::string, Tensor> tensors, bool strict = true);
  // The report alone: looks at names and types, reads no value and changes nothing.
  LoadReport CheckParameters(const std::map<std::string, Tensor>& tensors) const;
  // Lets go of all values, to save memory, and of what Forward keeps here and in the layers around
  // this one. Exported graphs and compiled code that were made before keep their values; for what
  // is made later a value that has not been loaded, set or drawn again is a ValueError. New values
  // are trainable or not as the old ones were.
  void ReleaseParameters();
  // Copies of all values by path.
  std::map<std::string, Tensor> SaveParameters();

  // Training mode decides whether Forward keeps values for Backward, and whether dropout is active.
  // Set for all sub-layers too.
  void SetTrainingMode(bool training);
  bool training() const { return training_; }
  // Gradient checkpointing of what this layer computes inside another one (through Call): its inner
  // values are computed again for the gradients instead of being kept. See
  // ComputationGraph::Segment.
  void SetRecompute(bool recompute);
  // True if Backward works, that is: every op of the layer has a gradient.
  virtual bool SupportsTraining() const { return true; }
  // True if the exported graph can be compiled; every op of this library can.
  virtual bool SupportsJitCompilation() const { return true; }
  // Another number whenever the exported graph could be another one, other than by SetTrainingMode:
  // options and sub-layers have changed. For what is kept of graphs and code.
  uint64_t Revision() const;
  // Facts for people: type, path, parameter count, mode, kept bytes, and what the layer adds.
  virtual std::map<std::string, std::string> GetDiagnostics() const;

  std::string_view type() const { return type_; }    // class name, e.g. "Linear"
  const std::string& path() const { return path_; }  // from the root, "" for the root itself
  const std::vector<std::unique_ptr<Layer>>& layers() const { return layers_; }

 protected:
  explicit Layer(std::string_view type);

  // Declares a parameter or a sub-layer; called by constructors.
  void AddParameter(std::string name, const Shape& shape, Initializer initializer);
  template <class L, class... Args>
  L* AddLayer(std::string name, Args&&... args) {
    auto layer = std::make_unique<L>(std::forward<Args>(args)...);
    L* result = layer.get();
    Attach(std::move(name), std::move(layer));
    return result;
  }
  // Removes a sub-layer with its parameters; graphs that were exported before keep them alive.
  void RemoveLayer(const Layer* layer);

  // The leaf of an own parameter.
  Value Leaf(ComputationGraph& graph, std::string_view name);
  // Input `index`; Errors: ShapeError naming `name` if it is absent.
  Value Required(std::span<const Value> inputs, size_t index, std::string_view name) const;
  // Input `index` or undefined.
  static Value Optional(std::span<const Value> inputs, size_t index) {
    return index < inputs.size() ? inputs[index] : Value{};
  }
  // Labels the nodes emitted during its life with the layer's name.
  ComputationGraph::Label Scope(ComputationGraph& graph) const {
    return ComputationGraph::Label(graph, name_);
  }
  // To be called when an option changes that the exported graph depends on.
  void Changed() { ++revision_; }
  // "Linear 'mid_block.proj'" for messages.
  std::string Describe() const;

 private:
  friend class LayerExecution;
  struct Declaration {
    std::string name;  // local
    Shape shape;
    Initializer initializer;
    ParameterPtr parameter;  // storage exists from the first use on
    bool has_value = false, released = false;
    bool trainable = true;  // of a parameter without storage
  };
  // Calls visit(layer, declaration) for every parameter: own ones, then those of the sub-layers.
  template <class Self, class F>
  static void Visit(Self& layer, const F& visit);
  void Attach(std::string name, std::unique_ptr<Layer> layer);
  void SetPath(const std::string& path);
  std::string PathOf(const Declaration& declaration) const;
  void Store(Declaration& declaration, Tensor value);
  Parameter& Storage(Declaration& declaration);
  void Draw(Declaration& declaration, uint64_t seed);
  void EnsureValue(Declaration& declaration);
  // Changes whenever an exported graph could change: options, mode, trainable flags.
  uint64_t StateKey() const;

  std::string_view type_;
  Layer* parent_ = nullptr;
  std::string name_, path_;
  bool training_ = true, recompute_ = false;
  uint64_t revision_ = 0;
  std::vector<Declaration> parameters_;
  std::vector<std::unique_ptr<Layer>> layers_;
  std::unique_ptr<LayerExecution> execution_;
};

}  // namespace calotype
