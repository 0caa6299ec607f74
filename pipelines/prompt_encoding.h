// Prompts in the syntaxes of AUTOMATIC1111 and compel as text embeddings: weights of words, long
// prompts in chunks, blends, schedules and compositions.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor.h"
#include "models/prompt_a1111.h"
#include "models/prompt_compel.h"
#include "pipelines/text_to_image.h"

namespace calotype {

enum class PromptSyntax : uint8_t { kPlain, kA1111, kCompel };
// plain, a1111, compel. Errors: ValueError for another name.
PromptSyntax ParsePromptSyntax(std::string_view name);

// What the syntaxes need of a text encoder.
struct PromptEncoder {
  int64_t length = 0;               // L, tokens of a chunk with bos and eos
  std::optional<int64_t> bos, eos;  // around the tokens of a chunk
  int64_t pad = 0;
  std::optional<int64_t> comma;  // see EncodeA1111
  // Whether the mean of an encoding is kept by a1111's weights. That of a caption encoder, whose
  // output is not normalised, may be next to 0 and says nothing.
  bool restore_mean = true;
  std::function<std::vector<int64_t>(std::string_view text)> tokenize;  // of the text alone
  // Rows of ids i64 [1, L], and a mask f32 [1, L] of tokens that are seen (1) or not (0), or
  // undefined if all are: embeddings [1, L, D].
  std::function<Tensor(const Tensor& ids, const Tensor& mask)> encode;

  int64_t capacity() const { return length - (bos ? 1 : 0) - (eos ? 1 : 0); }
};

// That of a pipeline's model. A caption encoder takes <pad> in place of a token that is not seen.
// Unknown words are reported to `warn`. Refers to the pipeline.
PromptEncoder MakePromptEncoder(TextToImagePipeline& pipeline, int64_t clip_skip,
                                const DiffusionModel::Warn& warn = {});

struct A1111Options {
  int64_t min_chunks = 1;        // empty ones are added
  bool inner_markers = true;     // false: bos and eos only at the ends of the whole
  int64_t comma_backtrack = 20;  // 0: chunks end anywhere
};
// The tokens of the runs in chunks of capacity() tokens, each within bos and eos and filled with
// eos (pad if there is none), a BREAK ends a chunk. A full chunk whose last comma is one of its
// last `comma_backtrack` tokens ends behind that comma, and the tokens behind it begin the next
// chunk, unless a comma follows the full chunk. E their embeddings one behind the other [T, D], T =
// L times the number of chunks, w the weights of the tokens (1 for bos, eos and padding):
//   E' = w E;  E' mean(E) / mean(E')
// Errors: NumericError if mean(E') is 0.
Tensor EncodeA1111(const PromptEncoder& encoder, std::span<const WeightedText> runs,
                   const A1111Options& options = {});

enum class Downweight : uint8_t {
  kMask,    // the fragment's tokens are there, but not seen
  kRemove,  // they are left out
};
// With z the encoding of the fragments' tokens (what is behind capacity() is cut off) and z0 that
// of no text: z0 + w (z - z0), token by token. Then the weighted mean of this (weight 1) and, for
// each fragment of weight w < 1, the same without it (weight tan((1 - max(w, 1e-5)) pi / 2)).
// Blends and conjunctions: see CompelBlend and CompelPrompt. Result [T, D]. `cut`, if given, is
// called when tokens were cut off.
Tensor EncodeCompel(const PromptEncoder& encoder, const CompelPrompt& prompt,
                    Downweight downweight = Downweight::kMask,
                    const std::function<void(int64_t tokens)>& cut = {});

// For GenerateOptions::context: the embeddings of options.prompts and options.negative_prompt in
// that syntax, all of one length (shorter ones are followed by the encoding of no text, made in the
// same way). Everything is encoded now. Errors: those of the parsers and encoders.
std::function<PictureContext(size_t picture, int64_t step, int64_t steps)> PromptContexts(
    TextToImagePipeline& pipeline, const GenerateOptions& options, PromptSyntax syntax,
    const DiffusionModel::Warn& warn = {});

}  // namespace calotype
