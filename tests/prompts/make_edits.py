"""Makes edits.json and edits.safetensors beside itself: pictures edited by Prompt-to-Prompt with diffusers' pipeline.

Written from the paper and the authors' program (google/prompt-to-prompt) for diffusers' attention modules, on the tiny
model of tests/fixtures/stable_diffusion. Versions as in make.py there.
"""
import json
import os
import pathlib

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (AutoencoderKL, DDIMScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler,
                       StableDiffusionPipeline, UNet2DConditionModel)
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

here = pathlib.Path(__file__).parent
model = here.parent / "fixtures/stable_diffusion/model"
TOKENS, LARGEST_SELF = 77, 16 * 16
schedulers = {"DDIMScheduler": DDIMScheduler, "PNDMScheduler": PNDMScheduler,
              "EulerAncestralDiscreteScheduler": EulerAncestralDiscreteScheduler}
base = {"edit_type": "replace", "cross": {"default_": [0, 0.4]}, "self": [0, 0.4], "equalizer": {}, "blend": [],
        "substruct": [], "steps": 6, "guidance_scale": 7.5, "sampler": "DDIMScheduler", "negative_prompt": "", "seed": 5}
cases = {
    "replace": {"prompts": ["the red cat", "the low cat"]},
    "words of several tokens": {"prompts": ["the red cat sat", "the yellow cat sat"], "cross": {"default_": [0, 0.8]}},
    "ranges of words": {"prompts": ["the red cat", "the blue cat"], "self": [0.1, 0.7],
                        "cross": {"default_": [0, 0.6], "blue": [0.2, 0.5]}},
    "refine, reweight": {"edit_type": "refine", "prompts": ["the cat", "the red cat on the floor"],
                         "cross": {"default_": [0, 0.8]}, "equalizer": {"red": 3}},
    "reweight": {"edit_type": "reweight", "prompts": ["the red cat", "the red cat"], "cross": {"default_": [0, 1]},
                 "equalizer": {"red": -2, "cat": 2}, "sampler": "EulerAncestralDiscreteScheduler",
                 "negative_prompt": "low"},
    "blend": {"prompts": ["the red cat", "the low cat"], "cross": {"default_": [0, 0.8]},
              "blend": ["red cat", "low cat"], "substruct": ["the", "the"]},
    "no guidance": {"edit_type": "refine", "prompts": ["the cat", "the red cat"], "cross": {"default_": [0, 0.8]},
                    "guidance_scale": 1.0, "sampler": "PNDMScheduler"},
}


def word_tokens(tokenizer, text, word):
    """Indices of the tokens of a word, or of the word at a place; the first token behind bos is 1."""
    split = text.split(" ")
    places = [word] if isinstance(word, int) else [i for i, w in enumerate(split) if w == word]
    result, place, length = [], 0, 0
    for i, token in enumerate(tokenizer.encode(text)[1:-1]):
        length += len(tokenizer.decode([token]).strip())
        if place in places:
            result.append(i + 1)
        if length >= len(split[place]):
            place, length = place + 1, 0
    return result


def replacement(tokenizer, x, y):
    a, b = x.split(" "), y.split(" ")
    pairs = [(word_tokens(tokenizer, x, i), word_tokens(tokenizer, y, i)) for i in range(len(a)) if a[i] != b[i]]
    matrix, i, j = np.zeros((TOKENS, TOKENS)), 0, 0
    while i < TOKENS and j < TOKENS:
        if pairs and pairs[0][0][0] == i:
            source, target = pairs.pop(0)
            if len(source) == len(target):
                matrix[source, target] = 1
            else:
                matrix[np.ix_(source, target)] = 1 / len(target)
            i, j = i + len(source), j + len(target)
        else:
            matrix[i if pairs else j, j] = 1
            i, j = i + 1, j + 1
    return matrix, np.ones(TOKENS)


def refinement(tokenizer, x, y):
    x, y = tokenizer.encode(x), tokenizer.encode(y)
    score = np.zeros((len(x) + 1, len(y) + 1), int)
    back = np.full(score.shape, "left")
    back[1:, 0] = "up"
    for i in range(1, len(x) + 1):
        for j in range(1, len(y) + 1):
            ways = {"left": score[i, j - 1], "up": score[i - 1, j],
                    "diag": score[i - 1, j - 1] + (1 if x[i - 1] == y[j - 1] else -1)}
            back[i, j] = max(ways, key=ways.get)  # the first of equal ones
            score[i, j] = ways[back[i, j]]
    matrix, alpha, i, j = np.eye(TOKENS), np.ones(TOKENS), len(x), len(y)
    while i > 0 or j > 0:
        way = back[i, j]
        i, j = i - (way != "left"), j - (way != "up")
        if way != "up":
            matrix[:, j] = 0
            if way == "diag":
                matrix[i, j] = 1
            else:
                alpha[j] = 0
    return matrix, alpha


class Control:
    def __init__(self, case, tokenizer):
        self.case, self.tokenizer, self.step, self.maps, self.sums = case, tokenizer, 0, [], None
        prompts, steps = case["prompts"], case["steps"]
        make = {"replace": replacement, "refine": refinement,
                "reweight": lambda *_: (np.eye(TOKENS), np.ones(TOKENS))}[case["edit_type"]]
        tables = [make(tokenizer, prompts[0], p) for p in prompts[1:]]
        self.matrix = [torch.tensor(m).float() for m, _ in tables]
        self.alpha = [torch.tensor(a).float() for _, a in tables]
        self.equalizer = torch.ones(len(prompts) - 1, TOKENS)
        self.cross = torch.zeros(steps + 1, len(prompts) - 1, TOKENS)
        for i, prompt in enumerate(prompts[1:]):
            for word, factor in case["equalizer"].items():
                self.equalizer[i, word_tokens(tokenizer, prompt, word)] = factor
            for word, (begin, end) in case["cross"].items():
                column = torch.zeros(steps + 1, 1)
                column[int(begin * (steps + 1)):int(end * (steps + 1))] = 1
                tokens = range(TOKENS) if word == "default_" else word_tokens(tokenizer, prompt, word)
                self.cross[:, i, list(tokens)] = column

    def edit(self, probs, is_cross, place, heads):
        count, steps = len(self.case["prompts"]), self.case["steps"]
        rest = probs.shape[0] - count * heads  # of the negative prompt
        a = probs[rest:].reshape(count, heads, *probs.shape[1:]).clone()
        if is_cross:
            share = self.cross[min(self.step, steps)]
            for i in range(count - 1):
                edited = (a[0] @ self.matrix[i]) * self.alpha[i] + a[i + 1] * (1 - self.alpha[i])
                a[i + 1] = edited * self.equalizer[i] * share[i] + a[i + 1] * (1 - share[i])
            if place != "mid":
                self.maps.append(a.mean(1))
        elif probs.shape[1] <= LARGEST_SELF:
            begin, end = (int(steps * s) for s in self.case["self"])
            if begin <= self.step < end:
                a[1:] = a[:1]
        return torch.cat([probs[:rest], a.reshape(-1, *probs.shape[1:])])

    def mask(self, texts, size, pool):
        result = []
        for i, (text, prompt) in enumerate(zip(texts, self.case["prompts"])):
            tokens = sum((word_tokens(self.tokenizer, prompt, w) for w in text.split(" ")), [])
            side = int(self.sums[0].shape[1] ** 0.5)
            m = torch.stack([s[i][:, tokens].sum(-1) for s in self.sums]).mean(0).reshape(1, 1, side, side)
            m = F.interpolate(F.max_pool2d(m, 3, 1, 1) if pool else m, size=size)
            result.append(m / m.max() > 0.3)
        return [(result[0] | m).float() for m in result]

    def after_step(self, _pipe, _step, _t, values):
        self.step += 1
        self.sums = self.maps if self.sums is None else [a + b for a, b in zip(self.sums, self.maps)]
        self.maps = []
        if self.case["blend"] and self.step > int(0.2 * self.case["steps"]):
            x = values["latents"]
            masks = self.mask(self.case["blend"], x.shape[2:], True)
            if self.case["substruct"]:
                other = self.mask(self.case["substruct"], x.shape[2:], False)
                masks = [m * (1 - o) for m, o in zip(masks, other)]
            values["latents"] = torch.cat([x[:1] + m * (x[i:i + 1] - x[:1]) for i, m in enumerate(masks)])
        return values


class Processor:
    def __init__(self, control, name):
        self.control, self.place = control, name.split("_")[0]

    def __call__(self, attn, x, encoder_hidden_states=None, **_):
        e = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(y) for y in (attn.to_q(x), attn.to_k(e), attn.to_v(e)))
        probs = attn.get_attention_scores(q, k, None)
        probs = self.control.edit(probs, encoder_hidden_states is not None, self.place, attn.heads)
        return attn.to_out[0](attn.batch_to_head_dim(probs @ v))


def draw(case, parts, control):
    unet, count = parts["unet"], len(case["prompts"])
    unet.set_attn_processor({n: Processor(control, n) for n in unet.attn_processors} if control else AttnProcessor())
    pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(prompt=case["prompts"], negative_prompt=[case["negative_prompt"]] * count,
                  num_inference_steps=case["steps"], guidance_scale=case["guidance_scale"], output_type="np",
                  generator=[torch.Generator().manual_seed(case["seed"]) for _ in range(count)],
                  callback_on_step_end=control.after_step if control else None).images
    return (images * 255).round().astype(np.uint8)


def main():
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    schedule = PNDMScheduler.from_pretrained(model / "scheduler").config
    parts = {"vae": AutoencoderKL.from_pretrained(model / "vae"), "unet": UNet2DConditionModel.from_pretrained(model / "unet"),
             "text_encoder": CLIPTextModel.from_pretrained(model / "text_encoder"),
             "tokenizer": CLIPTokenizer.from_pretrained(model / "tokenizer")}
    pictures, used = {}, {}
    for name, case in cases.items():
        case = {**base, **case}
        parts["scheduler"] = schedulers[case["sampler"]].from_config(schedule)
        edited, plain = draw(case, parts, Control(case, parts["tokenizer"])), draw(case, parts, None)
        used[name] = case
        pictures[name] = torch.from_numpy(edited).permute(0, 3, 1, 2).contiguous()
        change = np.abs(edited.astype(int) - plain).reshape(len(plain), -1).max(1)
        print(f"{name:24} changed by {change}")
        assert change[0] == 0 and change[1:].min() > 20
    (here / "edits.json").write_text(json.dumps(
        {"source": f"make_edits.py, diffusers {diffusers.__version__}", "cases": used}, indent=1) + "\n")
    save_file(pictures, here / "edits.safetensors")
    (here / "edits.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
