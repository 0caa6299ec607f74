#include "pipelines/attention_editing.h"

#include <algorithm>
#include <array>
#include <limits>

#include "core/error.h"
#include "diffusion/scheduler.h"
#include "graph/functions.h"
#include "pipelines/attention_maps.h"

namespace calotype {
namespace {

constexpr const char* kDefault = "default_";

void CheckRange(const StepRange& range, std::string_view name) {
  Check(range.begin >= 0 && range.begin <= range.end && range.end <= 1,
        "prompt-to-prompt: {} from {} to {}, must be within 0 to 1", name, range.begin, range.end);
}

bool Inside(const StepRange& range, int64_t step, int64_t steps) {
  auto at = [&](double share) { return static_cast<int64_t>(share * static_cast<double>(steps)); };
  return step >= at(range.begin) && step < at(range.end);
}

bool Has(const PromptTokens& prompt, const std::string& word) {
  try {
    prompt.Of(word);
    return true;
  } catch (const ValueError&) {
    return false;
  }
}

}  // namespace

// ---------------------------------------------------------------- tables

Tensor ReplacementMap(const PromptTokens& source, const PromptTokens& target) {
  Check(source.words.size() == target.words.size(),
        "prompt-to-prompt: replace needs prompts of equally many words, not {} (\"{}\") and {} "
        "(\"{}\"); use refine",
        source.words.size(), fmt::join(source.words, " "), target.words.size(),
        fmt::join(target.words, " "));
  int64_t length = source.length;
  Tensor map = Tensor::Zeros({length, length});
  auto at = [&](int64_t i, int64_t j) -> float& { return map.data()[i * length + j]; };
  std::vector<size_t> replaced;
  for (size_t word = 0; word < source.words.size(); ++word) {
    if (source.words[word] == target.words[word]) continue;
    // Words that did not fit into a row have no tokens.
    if (!source.positions[word].empty() && !target.positions[word].empty()) {
      replaced.push_back(word);
    }
  }
  int64_t i = 0, j = 0;
  size_t next = 0;
  while (i < length && j < length) {
    if (next < replaced.size() && source.positions[replaced[next]][0] == i) {
      const auto& from = source.positions[replaced[next]];
      const auto& to = target.positions[replaced[next]];
      for (size_t t = 0; t < to.size(); ++t) {
        if (from.size() == to.size()) {
          at(from[t], to[t]) = 1;
        } else {
          for (int64_t s : from) at(s, to[t]) = 1 / static_cast<float>(to.size());
        }
      }
      i += static_cast<int64_t>(from.size());
      j += static_cast<int64_t>(to.size());
      ++next;
    } else {
      // Behind the last replaced word all is padding, or words that the picture hardly depends on:
      // as in the authors' program the diagonal.
      at(next < replaced.size() ? i : j, j) = 1;
      ++i, ++j;
    }
  }
  return map;
}

std::vector<int64_t> RefinementMap(std::span<const int64_t> source, std::span<const int64_t> target,
                                   int64_t length) {
  size_t n = source.size(), m = target.size();
  enum : uint8_t { kLeft, kUp, kDiagonal };
  std::vector<int64_t> score((n + 1) * (m + 1), 0);
  std::vector<uint8_t> back((n + 1) * (m + 1), kLeft);
  auto at = [&](size_t i, size_t j) { return i * (m + 1) + j; };
  for (size_t i = 1; i <= n; ++i) {
    back[at(i, 0)] = kUp;
    for (size_t j = 1; j <= m; ++j) {
      int64_t left = score[at(i, j - 1)], up = score[at(i - 1, j)];
      int64_t diagonal = score[at(i - 1, j - 1)] + (source[i - 1] == target[j - 1] ? 1 : -1);
      int64_t best = std::max({left, up, diagonal});
      score[at(i, j)] = best;
      back[at(i, j)] = best == left ? kLeft : best == up ? kUp : kDiagonal;
    }
  }
  std::vector<int64_t> map(static_cast<size_t>(length));
  for (int64_t k = 0; k < length; ++k) map[static_cast<size_t>(k)] = k;
  for (size_t i = n, j = m; i > 0 || j > 0;) {
    uint8_t step = back[at(i, j)];
    if (step != kLeft) --i;
    if (step != kUp) --j;
    if (step == kUp || j >= map.size()) continue;
    map[j] = step == kDiagonal ? static_cast<int64_t>(i) : -1;
  }
  return map;
}

Tensor CrossReplaceTable(const PromptTokens& target, const std::map<std::string, StepRange>& ranges,
                         int64_t steps) {
  int64_t rows = steps + 1, length = target.length;
  Tensor table = Tensor::Zeros({rows, length});
  auto fill = [&](const StepRange& range, const std::vector<int64_t>* positions) {
    for (int64_t step = 0; step < rows; ++step) {
      float value = Inside(range, step, rows) ? 1.0f : 0.0f;
      float* row = table.data() + step * length;
      if (positions) {
        for (int64_t position : *positions) row[position] = value;
      } else {
        std::fill_n(row, length, value);
      }
    }
  };
  auto all = ranges.find(kDefault);
  fill(all == ranges.end() ? StepRange{} : all->second, nullptr);
  for (const auto& [word, range] : ranges) {
    if (word == kDefault || !Has(target, word)) continue;
    std::vector<int64_t> positions = target.Of(word);
    fill(range, &positions);
  }
  return table;
}

AttentionEditTables MakeAttentionEditTables(std::span<const PromptTokens> prompts,
                                            const AttentionEditOptions& options, int64_t steps) {
  const AttentionEditOptions& o = options;
  Check(prompts.size() >= 2, "prompt-to-prompt: {} prompts, needs a source and a target",
        prompts.size());
  Check(o.edit_type == "replace" || o.edit_type == "refine" || o.edit_type == "reweight",
        "prompt-to-prompt: edit_type `{}` is unknown; there are replace, refine and reweight",
        o.edit_type);
  Check(o.equalizer_words.size() == o.equalizer_strengths.size(),
        "prompt-to-prompt: {} equalizer_words and {} equalizer_strengths, must be as many",
        o.equalizer_words.size(), o.equalizer_strengths.size());
  Check(o.edit_type != "reweight" || !o.equalizer_words.empty(),
        "prompt-to-prompt: reweight changes nothing without equalizer_words");
  for (const auto& [word, range] : o.n_cross_replace) {
    CheckRange(range, fmt::format("n_cross_replace of {}", word));
    bool known = word == kDefault;
    for (const PromptTokens& prompt : prompts.subspan(1)) known |= Has(prompt, word);
    Check(known, "prompt-to-prompt: n_cross_replace names \"{}\", which no target has", word);
  }
  CheckRange(o.n_self_replace, "n_self_replace");

  int64_t length = prompts[0].length;
  auto targets = static_cast<int64_t>(prompts.size()) - 1;
  AttentionEditTables tables;
  tables.map = Tensor::Zeros({targets, length, length});
  Tensor keep = Tensor::Zeros({targets, length}), equalizer = Tensor::Full({targets, length}, 1);
  std::vector<Tensor> alpha;
  std::vector<bool> found(o.equalizer_words.size(), false);
  for (int64_t i = 0; i < targets; ++i) {
    const PromptTokens& target = prompts[static_cast<size_t>(i) + 1];
    float* map = tables.map.data() + i * length * length;
    if (o.edit_type == "replace") {
      Tensor replacement = ReplacementMap(prompts[0], target);
      std::copy_n(replacement.data(), length * length, map);
    } else if (o.edit_type == "refine") {
      std::vector<int64_t> from = RefinementMap(prompts[0].ids, target.ids, length);
      for (int64_t j = 0; j < length; ++j) {
        int64_t source = from[static_cast<size_t>(j)];
        if (source >= 0) map[source * length + j] = 1;
        if (source < 0) keep.data()[i * length + j] = 1;
      }
    } else {
      Check(target.words == prompts[0].words,
            "prompt-to-prompt: reweight keeps the words of the source, \"{}\"; the target is "
            "\"{}\"",
            fmt::join(prompts[0].words, " "), fmt::join(target.words, " "));
      for (int64_t j = 0; j < length; ++j) map[j * length + j] = 1;
    }
    for (size_t w = 0; w < o.equalizer_words.size(); ++w) {
      if (!Has(target, o.equalizer_words[w])) continue;
      found[w] = true;
      for (int64_t position : target.Of(o.equalizer_words[w])) {
        equalizer.data()[i * length + position] = static_cast<float>(o.equalizer_strengths[w]);
      }
    }
    alpha.push_back(CrossReplaceTable(target, o.n_cross_replace, steps));
  }
  for (size_t w = 0; w < found.size(); ++w) {
    Check(found[w], "prompt-to-prompt: no target has the equalizer word \"{}\"",
          o.equalizer_words[w]);
  }
  for (int64_t step = 0; step <= steps; ++step) {
    Tensor from_source({targets, length}), own({targets, length});
    for (int64_t i = 0; i < targets; ++i) {
      for (int64_t j = 0; j < length; ++j) {
        int64_t k = i * length + j;
        float a = alpha[static_cast<size_t>(i)].data()[step * length + j];
        float strength = equalizer.data()[k] * a;
        from_source.data()[k] = strength;
        own.data()[k] = keep.data()[k] * strength + (1 - a);
      }
    }
    tables.from_source.push_back(from_source);
    tables.own.push_back(own);
    tables.self.push_back(Inside(o.n_self_replace, step, steps) ? 1.0f : 0.0f);
  }
  return tables;
}

// ---------------------------------------------------------------- blending

Tensor LocalBlendMask(std::span<const Tensor> maps, std::span<const std::vector<int64_t>> positions,
                      int64_t height, int64_t width, double threshold, bool pool) {
  Check(!maps.empty(), "prompt-to-prompt: no attention maps to blend by");
  auto pictures = static_cast<int64_t>(positions.size());
  auto [h, w] = MapSides(maps[0].shape()[1], height, width);
  int64_t pixels = h * w;
  Tensor mask({pictures, height, width});
  std::vector<double> map(static_cast<size_t>(pixels)), pooled(map.size());
  for (int64_t i = 0; i < pictures; ++i) {
    std::fill(map.begin(), map.end(), 0.0);
    for (const Tensor& layer : maps) {
      Check<ShapeError>(
          layer.shape().rank() == 3 && layer.shape()[0] == pictures && layer.shape()[1] == pixels,
          "prompt-to-prompt: a map {} among maps of {} pictures and {} pixels", layer.shape(),
          pictures, pixels);
      int64_t tokens = layer.shape()[2];
      for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t token : positions[static_cast<size_t>(i)]) {
          map[static_cast<size_t>(p)] += layer.data()[(i * pixels + p) * tokens + token];
        }
      }
    }
    for (int64_t y = 0; y < h; ++y) {
      for (int64_t x = 0; x < w; ++x) {
        double largest = map[static_cast<size_t>(y * w + x)];
        int64_t reach = pool ? 1 : 0;
        for (int64_t v = std::max<int64_t>(0, y - reach); v <= std::min(h - 1, y + reach); ++v) {
          for (int64_t u = std::max<int64_t>(0, x - reach); u <= std::min(w - 1, x + reach); ++u) {
            largest = std::max(largest, map[static_cast<size_t>(v * w + u)]);
          }
        }
        pooled[static_cast<size_t>(y * w + x)] = largest;
      }
    }
    double limit = threshold * *std::max_element(pooled.begin(), pooled.end());
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t x = 0; x < width; ++x) {
        double value = pooled[static_cast<size_t>((y * h / height) * w + x * w / width)];
        bool source = i > 0 && mask.data()[y * width + x] > 0;
        mask.data()[(i * height + y) * width + x] = value > limit || source ? 1.0f : 0.0f;
      }
    }
  }
  return mask;
}

// ---------------------------------------------------------------- pictures

namespace {

// The edit in the graph: further inputs, and the changed probabilities.
struct EditInputs {
  Value map, from_source, own, self;

  EditInputs(ComputationGraph& graph, int64_t targets, int64_t length)
      : map(graph.Input("edit_map", Shape{targets, length, length})),
        from_source(graph.Input("edit_from_source", Shape{targets, length})),
        own(graph.Input("edit_own", Shape{targets, length})),
        self(graph.Input("edit_self", Shape{1})) {}

  // probs [rows, heads, L, S]; the last `pictures` rows have the prompts, the source's first.
  Value Cross(Value probs, int64_t pictures) const {
    auto column = [](Value x) { return Reshape(x, {x.dim(0), 1, 1, x.dim(1)}); };
    return Replace(probs, pictures, [&](Value source, Value targets) {
      Value maps = Reshape(map, {map.dim(0), 1, map.dim(1), map.dim(2)});
      return MatMul(source, maps) * column(from_source) + targets * column(own);
    });
  }
  Value Self(Value probs, int64_t pictures) const {
    return Replace(probs, pictures, [&](Value source, Value targets) {
      return source * self + targets * (1.0f - self);
    });
  }

 private:
  template <class F>
  static Value Replace(Value probs, int64_t pictures, const F& edit) {
    int64_t first = probs.dim(0) - pictures;
    Value source = Slice(probs, 0, first, 1), targets = Slice(probs, 0, first + 1, pictures - 1);
    return Concat({Slice(probs, 0, 0, first + 1), edit(source, targets)}, 0);
  }
};

std::vector<std::vector<int64_t>> BlendPositions(std::span<const PromptTokens> prompts,
                                                 const std::vector<std::string>& words,
                                                 std::string_view name) {
  Check(words.empty() || words.size() == prompts.size(),
        "prompt-to-prompt: {} texts of {} for {} prompts (source first)", words.size(), name,
        prompts.size());
  std::vector<std::vector<int64_t>> positions;
  for (size_t i = 0; i < words.size(); ++i) {
    positions.emplace_back();
    for (const std::string& word : SplitWords(words[i])) {
      std::vector<int64_t> of = prompts[i].Of(word);
      positions.back().insert(positions.back().end(), of.begin(), of.end());
    }
  }
  return positions;
}

// x_0 + mask (x - x_0).
void Blend(Tensor& x, const Tensor& mask) {
  int64_t pictures = x.shape()[0], channels = x.shape()[1],
          pixels = mask.shape()[1] * mask.shape()[2];
  for (int64_t i = 1; i < pictures; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = 0; p < pixels; ++p) {
        float& value = x.data()[(i * channels + c) * pixels + p];
        float source = x.data()[c * pixels + p];
        value = source + mask.data()[i * pixels + p] * (value - source);
      }
    }
  }
}

}  // namespace

Tensor EditPictures(TextToImagePipeline& pipeline, std::span<const std::string> prompts,
                    GenerateOptions options, const AttentionEditOptions& edit,
                    const GenerateCallbacks& callbacks) {
  DiffusionModel& model = pipeline.model();
  Check(!options.seeds.empty(), "prompt-to-prompt: no seed");
  Check(options.rng != "torch-batch",
        "prompt-to-prompt: rng torch-batch draws another noise for each picture, these share one; "
        "take torch");
  Check(!options.context, "prompt-to-prompt: ready embeddings have no words to edit by");
  std::vector<PromptTokens> tokens;
  for (const std::string& prompt : prompts) tokens.push_back(TokenizePrompt(model, prompt));
  AttentionEditTables tables = MakeAttentionEditTables(tokens, edit, options.steps);
  auto blend = BlendPositions(tokens, edit.local_blend_words, "local_blend_words");
  auto except = BlendPositions(tokens, edit.substruct_words, "substruct_words");
  Check(except.empty() || !blend.empty(),
        "prompt-to-prompt: substruct_words have no effect without local_blend_words");
  bool blends = !blend.empty();

  auto pictures = static_cast<int64_t>(prompts.size());
  int64_t length = model.caption_tokens();
  options.prompts.assign(prompts.begin(), prompts.end());
  options.seeds.assign(prompts.size(), options.seeds[0]);
  options.batch_size = pictures;

  GenerateHooks hooks;
  hooks.key = fmt::format("prompt-to-prompt, self {}, {} blending", edit.self_pixels,
                          blends ? "with" : "no");
  hooks.denoise = [&](const PictureBatch& batch, ComputationGraph& graph, Value sample,
                      Value timestep, Value context) {
    Check(batch.size() == pictures && batch.positives == 1,
          "prompt-to-prompt: {} of {} pictures are computed together, each with {} contexts",
          batch.size(), pictures, batch.positives);
    EditInputs inputs(graph, pictures - 1, length);
    using Block = AttentionPlace::Block;
    std::vector<Value> maps;  // of the down and up blocks' cross-attention
    ScopedAttentionHooks scope(
        model.unet(),
        [&](const AttentionPlace& place, int64_t pixels, int64_t) {
          return place.cross || pixels <= edit.self_pixels;
        },
        [&](const AttentionPlace& place, Value probs) {
          if (!place.cross) return inputs.Self(probs, pictures);
          Value edited = inputs.Cross(probs, pictures);
          if (blends && place.block != Block::kMid) {
            maps.push_back(Mean(Slice(edited, 0, edited.dim(0) - pictures, pictures), {1}));
          }
          return edited;
        });
    std::vector<Value> outputs = {model.Denoise(sample, timestep, context)};
    // Blending goes by the smallest maps, 16 x 16 for Stable Diffusion.
    int64_t least = std::numeric_limits<int64_t>::max();
    for (Value map : maps) least = std::min(least, map.dim(1));
    for (Value map : maps) {
      if (map.dim(1) == least) outputs.push_back(map);
    }
    return outputs;
  };
  hooks.inputs = [&](const PictureBatch&, int64_t step) {
    auto at = static_cast<size_t>(std::min(step, options.steps));
    return std::vector{tables.map, tables.from_source[at], tables.own[at],
                       Tensor::Full({1}, tables.self[at])};
  };
  std::vector<Tensor> sums;
  hooks.outputs = [&](const PictureBatch&, int64_t step, std::span<const Tensor> maps) {
    if (step == 0) sums.clear();
    for (size_t i = 0; i < maps.size(); ++i) {
      if (step == 0) sums.push_back(Tensor::Zeros(maps[i].shape()));
      sums[i] = LinearCombination({{1, sums[i]}, {1, maps[i]}});
    }
  };
  auto first_blend = static_cast<int64_t>(edit.start_blend * static_cast<double>(options.steps));
  hooks.after_step = [&](const PictureBatch&, int64_t step, Tensor x) {
    if (!blends || step + 1 <= first_blend) return x;
    Tensor mask =
        LocalBlendMask(sums, blend, x.shape()[2], x.shape()[3], edit.blend_threshold, true);
    if (!except.empty()) {
      Tensor not_there =
          LocalBlendMask(sums, except, x.shape()[2], x.shape()[3], edit.blend_threshold, false);
      for (int64_t i = 0; i < mask.elements(); ++i) mask.data()[i] *= 1 - not_there.data()[i];
    }
    Tensor blended = x.Clone();
    Blend(blended, mask);
    return blended;
  };
  options.hooks = hooks;
  return pipeline.Generate(options, callbacks);
}

}  // namespace calotype
