#include "pipelines/kernel_cases.h"

#include <fmt/format.h>

#include <cmath>
#include <memory>
#include <utility>

#include "core/random.h"
#include "graph/flop.h"
#include "graph/functions.h"
#include "layers/diffusion_cross_attention.h"
#include "layers/feed_forward.h"
#include "layers/flash_attention_layer.h"
#include "layers/resnet.h"
#include "layers/transformer.h"

namespace calotype {
namespace {

KernelCase Finish(std::string name, std::function<ComputationGraph()> graph) {
  KernelCase result{std::move(name), 0, std::move(graph), {}};
  ComputationGraph once = result.graph();
  result.flop = CountFlop(once);
  Random random(0, result.name);
  for (int32_t input : once.inputs())
    result.inputs.push_back(random.NormalTensor(once.node(input).types[0].shape));
  return result;
}

// Inputs are named as they come; their meaning is the layer's.
template <class L>
KernelCase LayerCase(std::string name, const typename L::Options& options,
                     std::vector<Shape> inputs) {
  auto layer = std::make_shared<L>(options);
  layer->Initialize(0);
  layer->SetTrainingMode(false);
  return Finish(std::move(name), [layer, inputs = std::move(inputs)] {
    std::vector<GraphInput> declared;
    for (const Shape& shape : inputs)
      declared.push_back({fmt::format("x{}", declared.size()), {DType::kF32, shape}});
    return layer->Export(declared);
  });
}

KernelCase Convolution(int64_t channels, int64_t side) {
  return LayerCase<nn::Conv2d>(fmt::format("conv3x3 {0}->{0} {1}x{1}", channels, side),
                               {.in_channels = channels, .out_channels = channels, .padding = 1},
                               {{1, channels, side, side}});
}

KernelCase AttentionCase(const char* name, int64_t queries, int64_t keys, int64_t heads,
                         int64_t head_dim) {
  return Finish(fmt::format("{} {}x{} {} heads of {}", name, queries, keys, heads, head_dim), [=] {
    ComputationGraph graph;
    Value q = graph.Input("q", Shape{1, queries, heads * head_dim}),
          k = graph.Input("k", Shape{1, keys, heads * head_dim}),
          v = graph.Input("v", Shape{1, keys, heads * head_dim});
    graph.Output(
        "out",
        Attention(q, k, v, {.heads = heads, .scale = 1 / std::sqrt(static_cast<double>(head_dim))})
            .out);
    return graph;
  });
}

}  // namespace

std::vector<KernelCase> KernelCases() {
  std::vector<KernelCase> cases;
  cases.push_back(LayerCase<nn::Linear>("gemm 4096x320x1280",
                                        {.in_features = 1280, .out_features = 320, .bias = false},
                                        {{4096, 1280}}));
  cases.push_back(Convolution(320, 64));
  cases.push_back(Convolution(640, 32));
  cases.push_back(Convolution(1280, 8));
  cases.push_back(AttentionCase("self-attention", 4096, 4096, 8, 40));
  cases.push_back(AttentionCase("cross-attention", 4096, 77, 8, 40));
  return cases;
}

std::vector<KernelCase> LayerCases() {
  const Shape picture{1, 320, 64, 64}, tokens{1, 4096, 320}, text{1, 77, 768};
  std::vector<KernelCase> cases;
  cases.push_back(LayerCase<nn::ResnetBlock2D>("ResnetBlock2D 320 64x64",
                                               {.in_channels = 320, .temb_channels = 1280},
                                               {picture, {1, 1280}}));
  cases.push_back(LayerCase<nn::Transformer2DModel>("Transformer2DModel 320 64x64",
                                                    {.num_attention_heads = 8,
                                                     .attention_head_dim = 40,
                                                     .in_channels = 320,
                                                     .cross_attention_dim = 768},
                                                    {picture, text}));
  cases.push_back(
      LayerCase<nn::GroupNorm>("GroupNorm 320 64x64", {.num_channels = 320}, {picture}));
  cases.push_back(
      LayerCase<nn::LayerNorm>("LayerNorm 4096x320", {.normalized_shape = 320}, {tokens}));
  cases.push_back(LayerCase<nn::Linear>("Linear 4096 320->320",
                                        {.in_features = 320, .out_features = 320}, {tokens}));
  cases.push_back(LayerCase<nn::FeedForward>("FeedForward 4096 320", {.dim = 320}, {tokens}));
  cases.push_back(LayerCase<nn::Downsample2D>("Downsample2D 320 64->32",
                                              {.channels = 320, .use_conv = true}, {picture}));
  cases.push_back(LayerCase<nn::Upsample2D>(
      "Upsample2D 640 32->64", {.channels = 640, .use_conv = true}, {{1, 640, 32, 32}}));
  auto cross = std::make_shared<nn::DiffusionCrossAttention>(320, 768, 8, 64);
  cross->Initialize(0);
  cases.push_back(
      Finish("DiffusionCrossAttention 320 64x64", [cross] { return cross->ExportGraph(); }));
  auto flash = std::make_shared<nn::FlashAttentionLayer>(4096, 320, 8);
  flash->Initialize(0);
  cases.push_back(Finish("FlashAttentionLayer 4096 320", [flash] { return flash->ExportGraph(); }));
  return cases;
}

}  // namespace calotype
