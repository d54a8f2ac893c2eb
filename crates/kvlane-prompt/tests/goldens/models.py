"""Small tokenizers in the manner of the popular families, trained here from a fixed seed.

Each is a directory of ../models with what a model's directory has: tokenizer.json, tokenizer_config.json, and for some
chat_template.jinja. The vocabularies are tiny and the text they were trained on is nonsense; normalizers, pre-tokenizers,
added tokens, post-processors and tokenizer classes are those of the family.

Some of the trainers break ties at random, so a directory that is there is left as it is: delete it to train it again, and
write the goldens anew.
"""
import json
import os
import random

from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
DEEPSEEK = [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
            r"\s*[\r\n]+|\s+(?!\S)|\s+"]


def corpus():
    rng = random.Random(7)
    syllables = "ka to mi ren sol va tur il en ist ou gra pel dis co mar en ti on er".split()
    words = ["".join(rng.choice(syllables) for _ in range(rng.randint(1, 3))) for _ in range(150)]
    words += ("the a of to and in is it you that for on with as are this be at have from or one had by not but what all "
              "user assistant system tool call name function arguments result weather city what's don't I'll they're").split()
    lines = []
    for _ in range(1500):
        line = " ".join(rng.choice(words) for _ in range(rng.randint(3, 12)))
        r = rng.random()
        if r < 0.1:
            line = json.dumps({rng.choice(words): rng.randint(0, 9999), "name": rng.choice(words)})
        elif r < 0.2:
            line = "def %s(x):\n    return x * %d\n\n" % (rng.choice(words), rng.randint(0, 99))
        elif r < 0.28:
            line = "Größe café naïve — 数据 天气 привет мир こんにちは 🙂👍🏽 ﬁ Å é " + rng.choice(words)
        elif r < 0.4:
            line = line.capitalize() + rng.choice(".!?;:")
        lines.append(line)
    return lines


def byte_level(pattern=None, vocab=700, special=(), normalizer=None, pre=None):
    tok = Tokenizer(models.BPE(ignore_merges=pattern is LLAMA3))
    if normalizer:
        tok.normalizer = normalizer
    if pre is not None:
        tok.pre_tokenizer = pre
    elif pattern is None:
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tok.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=vocab, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tok.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in special])
    return tok


def sentencepiece(vocab, normalizer, pre, special, fallback=True):
    tok = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
    tok.normalizer, tok.pre_tokenizer = normalizer, pre
    base = list(special) + ["<0x%02X>" % b for b in range(256)]
    # Trained without the byte pieces, which only then take the ids after the special tokens.
    tok.train_from_iterator([line.replace("\n", " ") for line in corpus()], trainers.BpeTrainer(
        vocab_size=vocab, show_progress=False, limit_alphabet=90, special_tokens=base))
    raw = json.loads(tok.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(raw))


def template_processing(tok, bos, after_bytes=False):
    one = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1",
                                        special_tokens=[(bos, tok.token_to_id(bos))])
    tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), one]) if after_bytes else one


def write(out, name, tok, config, template=None):
    path = os.path.join(out, name)
    if os.path.exists(path):
        return
    os.makedirs(path)
    with open(os.path.join(path, "tokenizer.json"), "w", encoding="utf-8") as f:
        json.dump(json.loads(tok.to_str()), f, ensure_ascii=False, separators=(",", ":"))
        f.write("\n")
    with open(os.path.join(path, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, ensure_ascii=False, indent=1, sort_keys=True)
        f.write("\n")
    if template is not None:
        with open(os.path.join(path, "chat_template.jinja"), "w", encoding="utf-8") as f:
            f.write(template)


CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
# Prints what it gets, so that nothing the engine does to a request stays invisible.
VERBATIM = ("{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
            "{% for part in message.content %}{{ part | tojson }}{% endfor %}\n{{ message | tojson }}<|im_end|>\n{% endfor %}"
            "{% if tools %}{{ tools | tojson }}{% endif %}{% if documents %}{{ documents | tojson(indent=2) }}{% endif %}"
            "{{ reasoning_effort }}|{{ enable_thinking }}|{{ color }}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
STRINGS = VERBATIM.replace("{% for part in message.content %}{{ part | tojson }}{% endfor %}", "{{ message.content }}")


def tiktoken(out, name, vocab_of, config):
    """The byte-pair vocabulary of another model as a tiktoken file, with no tokenizer.json beside it."""
    import base64
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    path = os.path.join(out, name)
    if os.path.exists(path):
        return
    os.makedirs(path)
    byte = {c: b for b, c in bytes_to_unicode().items()}
    with open(os.path.join(out, vocab_of, "tokenizer.json"), encoding="utf-8") as f:
        vocab = json.load(f)["model"]["vocab"]
    with open(os.path.join(path, "tiktoken.model"), "w") as f:
        for token, rank in sorted(vocab.items(), key=lambda t: t[1]):
            f.write(base64.b64encode(bytes(byte[c] for c in token)).decode() + f" {rank}\n")
    with open(os.path.join(path, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, ensure_ascii=False, indent=1, sort_keys=True)
        f.write("\n")


def generate(out):
    os.makedirs(out, exist_ok=True)
    chat = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 4096}
    write(out, "gpt2-like", byte_level(special=chat), {"tokenizer_class": "PreTrainedTokenizerFast", **ends}, CHATML)

    tok = byte_level(LLAMA3, special=["<|begin|>", *chat])
    template_processing(tok, "<|begin|>", after_bytes=True)
    write(out, "llama3-like", tok, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", **ends,
                                    "chat_template": VERBATIM})

    tok = byte_level(QWEN2, special=chat, normalizer=normalizers.NFC())
    tok.add_tokens([AddedToken(t, normalized=False) for t in ("<tool_call>", "</tool_call>", "<think>", "</think>")])
    write(out, "qwen-like", tok, {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, **ends,
                                  "chat_template": STRINGS})

    def added(content, **flags):
        return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True, **flags}
    tiktoken(out, "tiktoken-like", "llama3-like", {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "bos_token": "<|begin|>", **ends, "chat_template": VERBATIM,
        "added_tokens_decoder": {"700": added("<|begin|>"), "701": added("<|im_start|>"), "702": added("<|im_end|>"),
                                 "705": added("<|endoftext|>"), "706": added("<tool_call>", special=False), "707": added("<left>", lstrip=True)}})

    tok = byte_level(O200K, special=chat)
    write(out, "o200k-like", tok, {"tokenizer_class": "PreTrainedTokenizerFast", **ends}, CHATML)

    splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in DEEPSEEK]
    tok = byte_level(special=["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", *chat],
                     pre=pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))
    tok.normalizer = normalizers.Sequence([])  # as the real one has it
    write(out, "deepseek-like", tok, {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True,
                                      "bos_token": "<｜begin▁of▁sentence｜>", **ends}, CHATML)

    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok = sentencepiece(900, spaces, None, ["<unk>", "<s>", "</s>"])
    template_processing(tok, "<s>")
    write(out, "llama2-like", tok, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False,
                                    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    write(out, "spm-like", tok, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
                                 "unk_token": "<unk>"})

    tok = sentencepiece(900, normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"),
                        ["<pad>", "<eos>", "<bos>", "<unk>"])
    tok.add_special_tokens([AddedToken(t, normalized=False) for t in ("<start_of_turn>", "<end_of_turn>")])
    template_processing(tok, "<bos>")
    write(out, "gemma-like", tok, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>",
                                   "unk_token": "<unk>", "pad_token": "<pad>"})

    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tok.train_from_iterator(corpus(), trainers.UnigramTrainer(
        vocab_size=500, show_progress=False, unk_token="<unk>", special_tokens=["<pad>", "</s>", "<unk>"]))
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    write(out, "t5-like", tok, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"})

    tok = byte_level(special=chat, normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
    tok.add_tokens([AddedToken("<left>", lstrip=True, normalized=False), AddedToken("<right>", rstrip=True, normalized=False),
                    AddedToken("<both>", lstrip=True, rstrip=True, normalized=False),
                    AddedToken("token", single_word=True, normalized=False), AddedToken("Folded", normalized=True),
                    AddedToken("<|im_", normalized=False), AddedToken("  ", normalized=False)])
    write(out, "odd-added", tok, {"tokenizer_class": "PreTrainedTokenizerFast", **ends}, CHATML)
