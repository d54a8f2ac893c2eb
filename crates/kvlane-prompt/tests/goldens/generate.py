#!/usr/bin/env python3
"""Write the goldens of kvlane-prompt's tests with the real thing: vLLM's own renderer and Python's transformers.

Usage: generate.py [models] [requests] [templates] [texts]      (default: all)

Needs the Python of a vLLM 0.32 installation (no engine is started, no GPU). See README.md.
"""
import asyncio
import json
import os
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
            if not os.path.exists(os.path.join(MODELS, name, "tokenizer.json")):
                continue
            engine = renderer(with_config(name, tmp))
            out[name] = {}
            for title, request in REQUESTS.items():
                out[name][title] = asyncio.run(render(engine, request))
    dump("requests.json", {"max_model_len": MAX_MODEL_LEN, "requests": REQUESTS, "tokens": out})


def main():
    steps = sys.argv[1:] or ["models", "requests", "templates", "texts"]
    if "models" in steps:
        import models
        models.generate(MODELS)
    if "requests" in steps:
        requests()


if __name__ == "__main__":
    main()
