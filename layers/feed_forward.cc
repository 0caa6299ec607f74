#include "layers/feed_forward.h"

#include "graph/functions.h"
#include "layers/activation.h"

namespace calotype::nn {

namespace {

// The names that FeedForward knows, with the activation and whether a second half is gated by it.
struct Form {
  std::string_view name, activation;
  bool gated;
};
constexpr Form kForms[] = {{"geglu", "gelu", true},
                           {"swiglu", "silu", true},
                           {"gelu", "gelu", false},
                           {"gelu-approximate", "gelu-approximate", false},
                           {"geglu-approximate", "quick_gelu", false},
                           {"linear-silu", "silu", false}};

}  // namespace

FeedForward::FeedForward(const Options& options) : Layer("FeedForward"), options_(options) {
  Options& o = options_;
  if (o.dim_out == 0) o.dim_out = o.dim;
  if (o.inner_dim == 0) o.inner_dim = CheckedMul(o.dim, o.mult, "FeedForward");
  Check<UnsupportedError>(o.dropout == 0, "FeedForward: dropout {} is not supported, only 0",
                          o.dropout);
  std::string known;
  for (const Form& form : kForms) {
    known += fmt::format("{}{}", known.empty() ? "" : ", ", form.name);
    if (form.name != o.activation_fn) continue;
    activation_ = form.activation;
    gated_ = form.gated;
  }
  Check(!activation_.empty(), "FeedForward: unknown activation_fn '{}'; known are {}",
        o.activation_fn, known);
  proj_ = AddLayer<Linear>("net.0.proj",
                           Linear::Options{o.dim, gated_ ? 2 * o.inner_dim : o.inner_dim, o.bias});
  out_ = AddLayer<Linear>("net.2", Linear::Options{o.inner_dim, o.dim_out, o.bias});
}

std::vector<Value> FeedForward::ExportComputationGraph(ComputationGraph&,
                                                       std::span<const Value> inputs) {
  Value h = proj_->Call(Required(inputs, 0, "hidden_states"));
  int64_t inner = options_.inner_dim;
  h = gated_ ? Slice(h, -1, 0, inner) * Activate(activation_, Slice(h, -1, inner, inner))
             : Activate(activation_, h);
  return {out_->Call(h)};
}

}  // namespace calotype::nn
