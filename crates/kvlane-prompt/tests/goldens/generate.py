#!/usr/bin/env python3
"""Write the goldens of kvlane-prompt's tests with the real thing: vLLM's own renderer and Python's transformers.

Usage: generate.py [models] [requests] [templates] [formats] [texts]      (default: all)
       generate.py live SEED COUNT FILE      texts.json's like with other texts, for TEXTS=FILE cargo test --test texts

Needs the Python of a vLLM 0.32 installation (no engine is started, no GPU). See README.md.
"""
import asyncio
import json
import os
import random
import shutil
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = os.path.join(HERE, "..", "models")
sys.path.insert(0, HERE)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["HF_HUB_OFFLINE"] = "1"

MAX_MODEL_LEN = 512
# What AutoTokenizer and vLLM need to recognise a directory as a model.
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
          "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 4096,
          "max_position_embeddings": 4096, "torch_dtype": "float32"}


def dump(name, value):
    with open(os.path.join(HERE, name), "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=False, indent=0)
        f.write("\n")


def model_names():
    return sorted(os.listdir(MODELS))


def with_config(name, tmp):
    path = os.path.join(tmp, name)
    shutil.copytree(os.path.join(MODELS, name), path)
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(CONFIG, f)
    return path


def renderer(path):
    from vllm.config import DeviceConfig, ModelConfig, VllmConfig
    from vllm.renderers import renderer_from_config
    from vllm.renderers.online_renderer import OnlineRenderer
    config = ModelConfig(model=path, tokenizer=path, dtype="float32", max_model_len=MAX_MODEL_LEN)
    base = renderer_from_config(VllmConfig(model_config=config, device_config=DeviceConfig(device="cpu")))
    return OnlineRenderer(config, base, request_logger=None, chat_template=None, chat_template_content_format="auto",
                          enable_auto_tools=True, tool_parser="hermes")


async def render(engine, request):
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    body = json.loads(json.dumps(request["body"]))
    try:
        if request["endpoint"] == "chat":
            result = await engine.render_chat(ChatCompletionRequest(**body))
            prompts = result[1]
        else:
            prompts = result = await engine.render_completion(CompletionRequest(**body))
        return [" ".join(map(str, p["prompt_token_ids"])) for p in prompts]
    except Exception as e:  # whatever the engine would answer with an error
        if os.environ.get("SHOW_ERRORS"):
            print(type(e).__name__, str(e)[:150].replace("\n", " "))
        return None


def requests():
    from requests_ import REQUESTS
    out = {}
    with tempfile.TemporaryDirectory() as tmp:
        for name in model_names():
            engine = renderer(with_config(name, tmp))
            out[name] = {}
            for title, request in REQUESTS.items():
                out[name][title] = asyncio.run(render(engine, request))
    dump("requests.json", {"max_model_len": MAX_MODEL_LEN, "requests": REQUESTS, "tokens": out})


TEMPLATES = os.path.join(HERE, "..", "templates")
# 2025-03-07 14:05:09 without a zone: what strftime_now prints in every golden.
NOW = 1741356309
# Longer texts are kept as length and hash; FULL_TEXTS=DIR writes them out.
LONGEST_TEXT = 160


def fnv1a(text):
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = (h ^ byte) * 0x100000001B3 % 2**64
    return f"{h:016x}"


def templates():
    import datetime

    import transformers.utils.chat_template_utils as utils
    from conversations import CONVERSATIONS
    from tokenizers import Tokenizer, models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls):
            return cls.fromtimestamp(NOW, datetime.timezone.utc).replace(tzinfo=None)
    utils.datetime = Frozen
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(tokenizer_models.BPE()), **special)
    full = os.environ.get("FULL_TEXTS")
    out = {}
    for file in sorted(os.listdir(TEMPLATES)):
        with open(os.path.join(TEMPLATES, file), encoding="utf-8", newline="") as f:
            source = f.read()
        texts = out[file] = {}
        for title, conversation in json.loads(json.dumps(CONVERSATIONS)).items():
            variables = conversation.pop("variables", {})
            messages = conversation.pop("messages")
            try:
                text = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **conversation, **variables)
            except Exception as e:
                if os.environ.get("SHOW_ERRORS"):
                    print(file, title, type(e).__name__, str(e)[:120].replace("\n", " "))
                texts[title] = None
                continue
            texts[title] = text if len(text) <= LONGEST_TEXT else {"bytes": len(text.encode()), "fnv1a": fnv1a(text)}
            if full:
                with open(os.path.join(full, f"{file}.{title}.txt"), "w", encoding="utf-8", newline="") as f:
                    f.write(text)
    dump("templates.json", {"now": NOW, "special_tokens": special, "conversations": CONVERSATIONS, "texts": out})


def formats():
    from vllm.renderers.hf import _detect_content_format
    from snippets import SNIPPETS
    out = {}
    for file in sorted(os.listdir(TEMPLATES)):
        with open(os.path.join(TEMPLATES, file), encoding="utf-8", newline="") as f:
            out[file] = _detect_content_format(f.read(), default="string")
    snippets = [[s, _detect_content_format(s, default="string")] for s in SNIPPETS]
    dump("formats.json", {"templates": out, "snippets": snippets})


def random_texts(seed, count):
    """Texts that try tokenizers: scripts, blanks, marks, digits, contractions, special tokens, and noise."""
    rng = random.Random(seed)
    special = ("<|im_start|> <|im_end|> <s> </s> <unk> <pad> <bos> <eos> <start_of_turn> <|begin|> <|endoftext|> <tool_call> <think> "
               "<｜User｜> <left> <right> <both> token tokens Folded folded <|im_ <0x0A> ▁ ▁▁ Ġ Ċ").split()
    words = ("hello World THE don't I'll they'RE we’ve it's 'S ſt straße İstanbul ǅ naïve e\u0301 A\u030a ﬁne ½ ² ① Ⅷ café "
             "数据处理 日本語テスト ひらがな カタカナ 한국어 텍스트 привет Ελληνικά עברית العربية ภาษาไทย हिन्दी தமிழ் 🙂 👍🏽 👩‍👩‍👧 🇩🇪 "
             "x=1; foo_bar fooBar http://a.b/c?d=e#f a@b.c 1,234.56 1234567 0x1F 3.14e-10 1st --- *** ... !? (a) [b] {c} \"q\" `t` $5 50% "
             "def f(x): return\\n // /* */ <b> &amp; \u00ad \u200d \ufeff \ufffd \ue000 \U0001f9ff \U000e0001").split(" ")
    blanks = [" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\u2028", "\x0b", "\x1c", "\x85", "", ""]
    ranges = [(0x20, 0x7e), (0x20, 0x7e), (0, 0x1f), (0x80, 0x24f), (0x250, 0x5ff), (0x600, 0x1fff), (0x2000, 0x2fff),
              (0x3000, 0x9fff), (0xa000, 0xd7ff), (0xe000, 0xffff), (0x10000, 0x1ffff), (0x20000, 0x10ffff)]
    texts = []
    for i in range(count):
        out = []
        for _ in range(rng.choice([1, 2, 5, 10, 30])):
            r = rng.random()
            if r < 0.6:
                out.append(rng.choice(words))
            elif r < 0.7:
                out.append(rng.choice(special))
            elif r < 0.8:
                low, high = rng.choice(ranges)
                out.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6))))
            elif r < 0.9:
                out.append("".join(rng.choice("0123456789") for _ in range(rng.randint(1, 12))))
            else:
                out.append(rng.choice(words).upper() + rng.choice(words))
            out.append(rng.choice(blanks))
        texts.append("".join(out))
    return texts


def texts(seed=20250307, count=400, file="texts.json"):
    from transformers import AutoTokenizer
    samples = random_texts(seed, count)
    out = {}
    with tempfile.TemporaryDirectory() as tmp:
        for name in model_names():
            tokenizer = AutoTokenizer.from_pretrained(with_config(name, tmp))
            # For each text: how many tokens, and a hash over "id id id".
            out[name] = []
            for text in samples:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                out[name].append(f"{len(ids)} {fnv1a(' '.join(map(str, ids)))}")
    dump(file, {"seed": seed, "texts": samples, "tokens": out})


def main():
    steps = sys.argv[1:] or ["models", "requests", "templates", "formats", "texts"]
    if "models" in steps:
        import models
        models.generate(MODELS)
    if "requests" in steps:
        requests()
    if "templates" in steps:
        templates()
    if "formats" in steps:
        formats()
    if "texts" in steps:
        texts()
    if steps[0] == "live":  # live SEED COUNT FILE
        texts(int(steps[1]), int(steps[2]), os.path.abspath(steps[3]))


if __name__ == "__main__":
    main()
