// Linear and Embedding: torch.nn's layers of these names. Concrete layers live in namespace nn
// because several share their name with the graph function that they wrap.
#pragma once

#include "layers/lora.h"

namespace calotype::nn {

// y = x weight^T + bias for x [..., in_features]; weight [out_features, in_features], bias
// [out_features], both drawn from U(-1/sqrt(in_features), 1/sqrt(in_features)) as in PyTorch.
class Linear : public LoRACompatible {
 public:
  struct Options {
    int64_t in_features = 0, out_features = 0;
    bool bias = true;
  };
  // Errors: ValueError unless the sizes are positive.
  explicit Linear(const Options& options);
  const Options& options() const { return options_; }
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  LoRALayer* MakeLoRA(const std::string& name, int64_t rank,
                      std::optional<double> network_alpha) override;
  Options options_;
};

// y[i.., :] = weight[ids[i..], :]; ids i32 or i64 of any shape, weight [num_embeddings,
// embedding_dim] drawn from N(0, 1). Errors at run time: ValueError for an id out of range.
class Embedding : public Layer {
 public:
  struct Options {
    int64_t num_embeddings = 0, embedding_dim = 0;
  };
  explicit Embedding(const Options& options);  // Errors: as Linear's
  const Options& options() const { return options_; }
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Options options_;
};

}  // namespace calotype::nn
