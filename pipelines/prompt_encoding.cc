#include "pipelines/prompt_encoding.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numbers>
#include <numeric>
#include <set>

#include "core/error.h"
#include "graph/functions.h"
#include "pipelines/rows.h"

namespace calotype {
namespace {

// A row of ids with the weights of its tokens.
struct Chunk {
  std::vector<int64_t> ids;
  std::vector<float> weights;
};

// The tokens within bos and eos, filled to L.
Chunk Wrap(const PromptEncoder& encoder, std::vector<int64_t> ids, std::vector<float> weights,
           int64_t fill) {
  if (encoder.bos) {
    ids.insert(ids.begin(), *encoder.bos);
    weights.insert(weights.begin(), 1);
  }
  if (encoder.eos) ids.push_back(*encoder.eos);
  ids.resize(static_cast<size_t>(encoder.length), fill);
  weights.resize(ids.size(), 1);
  return {std::move(ids), std::move(weights)};
}

// [L, D]
Tensor Encode(const PromptEncoder& encoder, const std::vector<int64_t>& ids,
              const std::vector<float>& mask = {}) {
  Tensor row = Tensor::From({1, encoder.length}, ids);
  Tensor z = encoder.encode(row, mask.empty() ? Tensor() : Tensor::From({1, encoder.length}, mask));
  Check<ShapeError>(z.shape().rank() == 3 && z.shape()[0] == 1 && z.shape()[1] == encoder.length,
                    "prompt: the text encoder made {} of {} tokens", z.shape(), encoder.length);
  return z.Reshape({z.shape()[1], z.shape()[2]});
}

double MeanOf(const Tensor& x) {
  double sum = 0;
  for (float v : x.values()) sum += v;
  return sum / static_cast<double>(x.elements());
}

}  // namespace

PromptSyntax ParsePromptSyntax(std::string_view name) {
  if (name == "plain") return PromptSyntax::kPlain;
  if (name == "a1111") return PromptSyntax::kA1111;
  Check(name == "compel", "prompt syntax `{}` is unknown; there are plain, a1111 and compel", name);
  return PromptSyntax::kCompel;
}

PromptEncoder MakePromptEncoder(TextToImagePipeline& pipeline, int64_t clip_skip,
                                const DiffusionModel::Warn& warn) {
  PromptEncoder encoder;
  DiffusionModel& model = pipeline.model();
  encoder.length = model.caption_tokens();
  auto encode = [&pipeline, clip_skip](const Tensor& ids) {
    return pipeline.Encode(ids, clip_skip);
  };
  if (const CLIPTokenizer* tokenizer = model.tokenizer()) {
    encoder.bos = tokenizer->bos();
    encoder.eos = tokenizer->eos();
    encoder.pad = tokenizer->pad();
    // A vocabulary without a comma gives its unknown token, which decodes to nothing.
    std::vector<int64_t> comma = tokenizer->Tokenize(",");
    if (comma.size() == 1 && tokenizer->Decode(comma).starts_with(',')) encoder.comma = comma[0];
    // Not this tokenizer: AddToken gives the model another one.
    encoder.tokenize = [&model](std::string_view text) {
      return model.tokenizer()->Tokenize(text);
    };
    // Few prompts need a mask, so that graph is interpreted.
    struct Masked {
      std::unique_ptr<GraphRunner> runner;
      uint64_t revision = 0;  // of CLIP
    };
    auto masked = std::make_shared<Masked>();
    encoder.encode = [=, clip = model.text_encoder(), &model](const Tensor& ids,
                                                              const Tensor& mask) {
      if (!mask.defined()) return encode(ids);
      if (!masked->runner || masked->revision != clip->Revision()) {
        model.SetTrainingMode(false);
        int64_t before = clip->clip_skip();
        clip->SetClipSkip(clip_skip);
        ComputationGraph graph;
        Value tokens = graph.Input("tokens", ids.type()), seen = graph.Input("mask", mask.type());
        graph.Output("context", clip->Call({tokens, seen}));
        clip->SetClipSkip(before);
        masked->runner = std::make_unique<GraphRunner>(std::move(graph), Backend::kEager);
        masked->revision = clip->Revision();
      }
      return masked->runner->Run(std::vector{ids, mask})[0];
    };
    return encoder;
  }
  encoder.pad = CaptionTokenizer::kPad;
  encoder.restore_mean = false;
  const CaptionTokenizer* words = model.caption_tokenizer();
  encoder.bos = words->start();
  auto reported = std::make_shared<std::set<std::string>>();
  encoder.tokenize = [words, warn, reported](std::string_view text) {
    CaptionTokenizer::Encoded encoded = words->Tokenize(text);
    for (const std::string& word : encoded.unknown) {
      if (warn && reported->insert(word).second) {
        warn(fmt::format("the model does not know the word \"{}\"; taken as <unk>", word));
      }
    }
    return encoded.ids;
  };
  encoder.encode = [=, pad = encoder.pad](const Tensor& ids, const Tensor& mask) {
    if (!mask.defined()) return encode(ids);
    Tensor seen = ids.Clone();
    for (int64_t i = 0; i < seen.elements(); ++i) {
      if (mask.data()[i] == 0) seen.data<int64_t>()[i] = pad;
    }
    return encode(seen);
  };
  return encoder;
}

// ---------------------------------------------------------------- AUTOMATIC1111

Tensor EncodeA1111(const PromptEncoder& encoder, std::span<const WeightedText> runs,
                   const A1111Options& options) {
  std::vector<Chunk> chunks;
  std::vector<int64_t> ids;
  std::vector<float> weights;
  std::optional<size_t> last_comma;  // place in ids
  auto end_chunk = [&] {
    last_comma.reset();
    chunks.push_back(Wrap(encoder, std::exchange(ids, {}), std::exchange(weights, {}),
                          encoder.eos.value_or(encoder.pad)));
  };
  for (const WeightedText& run : runs) {
    if (run.IsBreak()) {
      end_chunk();
      continue;
    }
    for (int64_t id : encoder.tokenize(run.text)) {
      const bool full = static_cast<int64_t>(ids.size()) == encoder.capacity();
      if (encoder.comma && id == *encoder.comma) {
        last_comma = ids.size();
      } else if (full && last_comma &&
                 static_cast<int64_t>(ids.size() - *last_comma) <= options.comma_backtrack) {
        auto behind = static_cast<int64_t>(*last_comma) + 1;
        std::vector<int64_t> moved(ids.begin() + behind, ids.end());
        std::vector<float> moved_weights(weights.begin() + behind, weights.end());
        ids.resize(static_cast<size_t>(behind));
        weights.resize(static_cast<size_t>(behind));
        end_chunk();
        ids = std::move(moved);
        weights = std::move(moved_weights);
      }
      if (static_cast<int64_t>(ids.size()) == encoder.capacity()) end_chunk();
      ids.push_back(id);
      weights.push_back(static_cast<float>(run.weight));
    }
  }
  if (!ids.empty() || chunks.empty()) end_chunk();
  while (static_cast<int64_t>(chunks.size()) < options.min_chunks) end_chunk();

  std::vector<Tensor> parts;
  std::vector<float> factors;
  for (size_t i = 0; i < chunks.size(); ++i) {
    Tensor z = Encode(encoder, chunks[i].ids);
    int64_t begin = 0, end = encoder.length;
    if (!options.inner_markers && i > 0 && encoder.bos) ++begin;
    if (!options.inner_markers && i + 1 < chunks.size() && encoder.eos) --end;
    parts.push_back(Rows(z, begin, end));
    factors.insert(factors.end(), chunks[i].weights.begin() + begin,
                   chunks[i].weights.begin() + end);
  }
  Tensor all = StackRows(parts);
  double before = MeanOf(all);
  int64_t width = all.shape()[1];
  bool weighted = false;
  for (int64_t t = 0; t < all.shape()[0]; ++t) {
    float factor = factors[static_cast<size_t>(t)];
    weighted |= factor != 1;
    for (int64_t d = 0; d < width; ++d) all.data()[t * width + d] *= factor;
  }
  if (!weighted || !encoder.restore_mean) return all;
  double restore = before / MeanOf(all);
  Check<NumericError>(std::isfinite(restore),
                      "prompt: with these weights the mean of the embeddings is 0");
  for (float& v : all.values()) v *= static_cast<float>(restore);
  return all;
}

// ---------------------------------------------------------------- compel

namespace {

// A prompt's fragments as one row, and where they are in it.
struct FragmentRow {
  Chunk chunk;
  std::vector<std::pair<size_t, size_t>> places;  // begin and end; equal: not in the row
  int64_t cut = 0;                                // tokens that did not fit
};

FragmentRow MakeRow(const PromptEncoder& encoder, std::span<const WeightedText> fragments) {
  FragmentRow row;
  auto capacity = static_cast<size_t>(encoder.capacity());
  size_t first = encoder.bos ? 1 : 0;
  std::vector<int64_t> ids;
  std::vector<float> weights;
  for (const WeightedText& fragment : fragments) {
    size_t begin = std::min(ids.size(), capacity);
    for (int64_t id : encoder.tokenize(fragment.text)) {
      ids.push_back(id);
      weights.push_back(static_cast<float>(fragment.weight));
    }
    size_t end = std::min(ids.size(), capacity);
    // As in compel, a fragment that is cut off reaches to the end of the row.
    bool reaches = ids.size() > capacity && end > begin;
    row.places.emplace_back(first + begin,
                            reaches ? static_cast<size_t>(encoder.length) : first + end);
  }
  if (ids.size() > capacity) {
    row.cut = static_cast<int64_t>(ids.size() - capacity);
    ids.resize(capacity);
    weights.resize(capacity);
  }
  row.chunk = Wrap(encoder, std::move(ids), std::move(weights), encoder.pad);
  return row;
}

class CompelEncoder {
 public:
  CompelEncoder(const PromptEncoder& encoder, Downweight downweight,
                const std::function<void(int64_t)>& cut)
      : encoder_(encoder),
        downweight_(downweight),
        cut_(cut),
        empty_(Encode(encoder, Wrap(encoder, {}, {}, encoder.pad).ids)) {}

  const Tensor& empty() const { return empty_; }

  Tensor Fragments(std::span<const WeightedText> fragments) {
    FragmentRow row = MakeRow(encoder_, fragments);
    if (row.cut > 0 && cut_) cut_(row.cut);
    std::vector<Tensor> encodings = {Weighted(row.chunk)};
    std::vector<double> weights = {1};
    for (size_t i = 0; i < fragments.size(); ++i) {
      auto [begin, end] = row.places[i];
      if (fragments[i].weight >= 1 || begin == end) continue;
      if (downweight_ == Downweight::kMask) {
        std::vector<float> mask(row.chunk.ids.size(), 1);
        std::fill(mask.begin() + static_cast<int64_t>(begin),
                  mask.begin() + static_cast<int64_t>(end), 0.0f);
        encodings.push_back(Weighted(row.chunk, mask));
      } else {
        std::vector<WeightedText> others(fragments.begin(), fragments.end());
        others.erase(others.begin() + static_cast<int64_t>(i));
        encodings.push_back(Weighted(MakeRow(encoder_, others).chunk));
      }
      double share = 1 - std::max(fragments[i].weight, 1e-5);
      weights.push_back(std::tan(share * std::numbers::pi / 2));
    }
    return Sum(encodings, weights, true);
  }

  // The weighted sum of encodings [T, D].
  static Tensor Sum(std::span<const Tensor> encodings, std::vector<double> weights,
                    bool normalize) {
    if (normalize) {
      double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
      for (double& weight : weights) weight /= sum;
    }
    if (encodings.size() == 1 && weights[0] == 1) return encodings[0];
    Tensor result(encodings[0].shape());
    for (int64_t k = 0; k < result.elements(); ++k) {
      double value = 0;
      for (size_t i = 0; i < encodings.size(); ++i) value += weights[i] * encodings[i].data()[k];
      result.data()[k] = static_cast<float>(value);
    }
    return result;
  }

 private:
  // z0 + w (z - z0), exactly z where w is 1.
  Tensor Weighted(const Chunk& chunk, const std::vector<float>& mask = {}) {
    Tensor z = Encode(encoder_, chunk.ids, mask).Clone();
    int64_t width = z.shape()[1];
    for (size_t t = 0; t < chunk.weights.size(); ++t) {
      if (chunk.weights[t] == 1) continue;
      for (int64_t d = 0; d < width; ++d) {
        int64_t k = static_cast<int64_t>(t) * width + d;
        float zero = empty_.data()[k];
        z.data()[k] = zero + chunk.weights[t] * (z.data()[k] - zero);
      }
    }
    return z;
  }

  const PromptEncoder& encoder_;
  Downweight downweight_;
  const std::function<void(int64_t)>& cut_;
  Tensor empty_;
};

}  // namespace

Tensor EncodeCompel(const PromptEncoder& encoder, const CompelPrompt& prompt, Downweight downweight,
                    const std::function<void(int64_t)>& cut) {
  CompelEncoder compel(encoder, downweight, cut);
  std::vector<Tensor> parts;
  for (size_t i = 0; i < prompt.parts.size(); ++i) {
    const CompelBlend& blend = prompt.parts[i];
    std::vector<Tensor> encodings;
    for (const auto& fragments : blend.prompts) encodings.push_back(compel.Fragments(fragments));
    bool single = encodings.size() == 1;
    Tensor part = CompelEncoder::Sum(encodings, blend.weights, blend.normalize);
    if (single && !blend.normalize) part = encodings[0];
    double weight = prompt.weights[i];
    if (weight != 1) {
      part = CompelEncoder::Sum(std::vector{compel.empty(), part}, {1 - weight, weight}, false);
    }
    parts.push_back(part);
  }
  return StackRows(parts);
}

// ---------------------------------------------------------------- contexts of pictures

namespace {

// The embeddings of texts, filled up to one length with that of no text.
class Encodings {
 public:
  explicit Encodings(std::function<Tensor(const std::string& text)> encode)
      : encode_(std::move(encode)) {}

  void Add(const std::string& text) {
    if (!known_.count(text)) known_[text] = encode_(text);
  }
  int64_t Longest() const {
    int64_t longest = 0;
    for (const auto& [text, tensor] : known_) longest = std::max(longest, tensor.shape()[0]);
    return longest;
  }
  // Nothing can be added after this: what encodes, which may hold CLIP's weights, is let go.
  void Fill(int64_t length) {
    Tensor empty;
    for (auto& [text, tensor] : known_) {
      if (tensor.shape()[0] == length) continue;
      if (!empty.defined()) empty = encode_("");
      std::vector<Tensor> parts = {tensor};
      for (int64_t t = tensor.shape()[0]; t < length; t += empty.shape()[0]) parts.push_back(empty);
      tensor = StackRows(parts);
    }
    encode_ = nullptr;
  }
  const Tensor& At(const std::string& text) const { return known_.at(text); }

 private:
  std::function<Tensor(const std::string& text)> encode_;
  std::map<std::string, Tensor> known_;
};

// What is drawn at a step.
struct StepTexts {
  std::vector<std::string> positive;
  std::vector<double> weights;
  std::optional<std::string> negative;
};

const std::string& TextAt(const std::vector<ScheduledText>& schedule, int64_t step) {
  for (const ScheduledText& text : schedule) {
    if (step < text.last_step) return text.text;
  }
  return schedule.back().text;  // samplers may take a few calls more than steps
}

}  // namespace

std::function<PictureContext(size_t, int64_t, int64_t)> PromptContexts(
    TextToImagePipeline& pipeline, const GenerateOptions& given, PromptSyntax syntax,
    const DiffusionModel::Warn& warn) {
  Check(syntax != PromptSyntax::kPlain, "prompt: plain prompts need no contexts of their own");
  GenerateOptions options = Resolved(pipeline.model(), given);
  // As with plain prompts the negative one does not skip layers.
  // Each side is filled up as it is encoded.
  auto encodings_by = [&](int64_t clip_skip) {
    return std::make_shared<Encodings>(
        [by = MakePromptEncoder(pipeline, clip_skip, warn), syntax, warn](const std::string& text) {
          if (syntax == PromptSyntax::kA1111) return EncodeA1111(by, ParseA1111Weights(text));
          return EncodeCompel(by, ParseCompel(text), Downweight::kMask, [&](int64_t cut) {
            if (warn) {
              warn(fmt::format(
                  "prompt \"{}\": the last {} tokens are behind the {} that the model reads", text,
                  cut, by.capacity()));
            }
          });
        });
  };
  auto positive = encodings_by(options.clip_skip), negative = encodings_by(0);

  std::vector<std::vector<StepTexts>> steps(options.prompts.size());
  bool a1111 = syntax == PromptSyntax::kA1111;
  auto schedule = [&](const std::string& text) {
    return a1111 ? ParseA1111Schedule(text, options.steps)
                 : std::vector<ScheduledText>{{options.steps, text}};
  };
  auto negative_schedule = schedule(options.negative_prompt);
  for (size_t picture = 0; picture < options.prompts.size(); ++picture) {
    std::vector<WeightedText> parts = {{options.prompts[picture], 1}};
    if (a1111) parts = ParseA1111Composition(options.prompts[picture]);
    bool composed = parts.size() > 1 || parts[0].weight != 1;
    bool guided = *options.guidance_scale > 1 || composed;
    std::vector<std::vector<ScheduledText>> schedules;
    for (const WeightedText& part : parts) schedules.push_back(schedule(part.text));
    for (int64_t step = 0; step < options.steps; ++step) {
      StepTexts texts;
      for (size_t i = 0; i < parts.size(); ++i) {
        texts.positive.push_back(TextAt(schedules[i], step));
        positive->Add(texts.positive.back());
        if (composed) texts.weights.push_back(parts[i].weight);
      }
      if (guided) {
        texts.negative = TextAt(negative_schedule, step);
        negative->Add(*texts.negative);
      }
      steps[picture].push_back(std::move(texts));
    }
  }
  const int64_t length = std::max(positive->Longest(), negative->Longest());
  positive->Fill(length);
  negative->Fill(length);
  return [positive, negative, steps](size_t picture, int64_t step, int64_t) {
    const auto& all = steps[picture];
    const StepTexts& texts = all[std::min(static_cast<size_t>(step), all.size() - 1)];
    PictureContext context{.weights = texts.weights};
    for (const std::string& text : texts.positive) context.positive.push_back(positive->At(text));
    if (texts.negative) context.negative = negative->At(*texts.negative);
    return context;
  };
}

}  // namespace calotype
