"""Request bodies, each sent to each model: what clients send, and the corners of what the engine makes of it."""

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a \"city\" — today", "strict": True, "unknown": 1,
    "parameters": {"type": "object", "required": ["city"], "properties": {
        "city": {"type": "string"}, "days": {"type": "integer", "default": 1, "minimum": 1e-07}, "items": {"enum": [None, True, 0.5, 1e16]}}}},
    "extra": 2}
BARE = {"function": {"name": "now"}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": "{\"days\": 2, \"city\": \"Köln\"}", "more": 3},
        "id": "call_1", "index": 0}


def user(text):
    return {"role": "user", "content": text}


def chat(*messages, **fields):
    return {"endpoint": "chat", "body": {"model": "m", "messages": list(messages), **fields}}


def completion(prompt, **fields):
    return {"endpoint": "completions", "body": {"model": "m", "prompt": prompt, **fields}}


SYSTEM = {"role": "system", "content": "You are a café's helper.\n"}
ANSWER = {"role": "assistant", "content": "It is 5 °C."}
TURNS = (SYSTEM, user("What's the weather in Köln?"), ANSWER, user("And tomorrow?"))

REQUESTS = {
    "one user message": chat(user("Hello there")),
    "turns": chat(*TURNS),
    "no generation prompt": chat(*TURNS, add_generation_prompt=False),
    "special tokens in text": chat(user("a <|im_start|>system\nx<|im_end|> b<s></s><bos>")),
    "added special tokens": chat(user("Hi"), add_special_tokens=True),
    "empty content": chat(user(""), {"role": "assistant", "content": None}, {"role": "assistant"}, user("x")),
    "unknown message fields": chat({"content": "hi", "role": "user", "name": "bob", "foo": {"a": 1}, "task": "t"}),
    "parts": chat({"role": "user", "content": [{"type": "text", "text": "one"}, {"text": "two", "type": "text"}, "three"]}),
    "part with more fields": chat({"role": "user", "content": [
        {"zed": 1, "type": "text", "cache_control": {"type": "ephemeral"}, "text": "one", "alpha": [2]}]}),
    "null part": chat({"role": "user", "content": [{"type": "text", "text": None}, {"type": "text", "text": "b"}]}),
    "refusal and thinking parts": chat({"role": "assistant", "content": [
        {"type": "refusal", "refusal": "no"}, {"type": "thinking", "thinking": "hm", "closed": True}, {"type": "output_text", "text": "t"}]}, user("x")),
    "no parts": chat({"role": "user", "content": []}),
    "part without type": chat({"role": "user", "content": [{"text": "x"}]}),
    "picture": chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}),
    "billing header": chat({"role": "system", "content": [{"type": "text", "text": "x-anthropic-billing-header: v=1; cch=ab"},
                                                          {"type": "text", "text": "x-anthropic-billing-header: v=1\nStay"}]}, user("x")),
    "billing header as string": chat({"role": "system", "content": "x-anthropic-billing-header: v=1"}, user("x")),
    "tools": chat(*TURNS, tools=[WEATHER, BARE]),
    "tools, choice none": chat(*TURNS, tools=[WEATHER], tool_choice="none"),
    "tools, choice auto": chat(*TURNS, tools=[BARE], tool_choice="auto"),
    "empty tools": chat(user("x"), tools=[]),
    "deferred tool": chat(user("x"), tools=[{**BARE, "type": "function", "defer_loading": True}]),
    "tool calls": chat(user("x"), {"role": "assistant", "content": "", "tool_calls": [CALL]},
                       {"role": "tool", "tool_call_id": "call_1", "content": "{\"t\": 5}"}),
    "tool calls, no content": chat(user("x"), {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
                                   {"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "tool_call_id": "call_1"}),
    "tool call arguments": chat(user("x"), {"role": "assistant", "tool_calls": [
        {"id": str(i), "type": "function", "function": {"name": "f", "arguments": a}}
        for i, a in enumerate(["", "{}", "not json", "[1]", "42", "null", "{\"b\": [1.0, 1e3], \"a\": null, \"b\": 2}"])]}),
    "empty tool calls": chat(user("x"), {"role": "assistant", "content": "y", "tool_calls": []}, user("z")),
    "null tool calls": chat(user("x"), {"role": "assistant", "content": "y", "tool_calls": None, "name": "n"}, user("z")),
    "reasoning": chat(user("x"), {"role": "assistant", "reasoning": "because", "content": "y"}, user("z")),
    "reasoning content": chat(user("x"), {"role": "assistant", "reasoning_content": "because", "content": "y"}, user("z")),
    "reasoning of a user": chat({"role": "user", "reasoning": "because", "content": "y"}),
    "reasoning and calls": chat(user("x"), {"role": "assistant", "reasoning_content": "r", "tool_calls": [CALL]}, user("z")),
    "developer": chat({"role": "developer", "content": "be brief"}, user("x")),
    "developer later": chat(SYSTEM, user("x"), {"role": "developer", "content": [{"type": "text", "text": "be brief"}], "tools": [BARE]}),
    "two systems": chat(SYSTEM, SYSTEM, user("x")),
    "custom role": chat({"role": "critic", "content": "hm", "name": "c"}),
    "documents": chat(user("x"), documents=[{"title": "T", "text": "body\n"}]),
    "template variables": chat(user("x"), chat_template_kwargs={"color": "blue", "enable_thinking": False, "documents": [1], "add_generation_prompt": False}),
    "template variable none": chat(user("x"), chat_template_kwargs={"color": None, "bos_token": "B"}),
    "tools as variable": chat(user("x"), tools=[BARE], chat_template_kwargs={"tools": [{"n": 1}]}),
    "reserved variable": chat(user("x"), chat_template_kwargs={"tokenize": True}),
    "messages as variable": chat(user("x"), chat_template_kwargs={"messages": []}),
    "reasoning effort": chat(user("x"), reasoning_effort="low"),
    "reasoning effort none": chat(user("x"), reasoning_effort="none"),
    "reasoning effort and thinking": chat(user("x"), reasoning_effort="high", chat_template_kwargs={"enable_thinking": False}),
    "own template": chat(user("x"), chat_template="{{ messages }}"),
    "continued": chat(user("x"), {"role": "assistant", "content": "The answer is "}, add_generation_prompt=False, continue_final_message=True),
    "continued parts": chat(user("x"), {"role": "assistant", "content": [{"type": "text", "text": "The "}, {"type": "text", "text": "answer"}]},
                            add_generation_prompt=False, continue_final_message=True),
    "continued and generation": chat(user("x"), ANSWER, continue_final_message=True),
    "no messages": chat(),
    "truncated chat": chat(*TURNS, truncate_prompt_tokens=7),
    "truncated chat left": chat(*TURNS, truncate_prompt_tokens=7, truncation_side="left"),
    "control characters": chat(user("a\u0000b\u0007c\u001b[0m\ttab\r\nend \u2028 \u0085 \ufeff")),
    "unicode": chat(user("naïve ﬁ Å e\u0301 数据 привет 🙂👍🏽 \u200d zero")),
    "text": completion("Hello there, user."),
    "empty text": completion(""),
    "text without special tokens": completion("Hello there", add_special_tokens=False),
    "text with special tokens": completion("<s> a <|begin|> b<bos></s> <|endoftext|>"),
    "texts": completion(["the first", "the second one"]),
    "token ids": completion([1, 2, 3]),
    "token id batch": completion([[1, 2], [3]]),
    "truncated text": completion("one two three four five six seven eight", truncate_prompt_tokens=4),
    "truncated text left": completion("one two three four five six seven eight", truncate_prompt_tokens=4, truncation_side="left"),
    "truncated text right": completion("one two three four five six seven eight", truncate_prompt_tokens=4, truncation_side="right"),
    "truncated to the model": completion("one two " * 300, truncate_prompt_tokens=-1),
    "truncated to the model without answer": completion("one two " * 300, truncate_prompt_tokens=-1, max_tokens=0),
    "truncated token ids": completion(list(range(20)), truncate_prompt_tokens=5),
    "truncated token ids left": completion(list(range(20)), truncate_prompt_tokens=5, truncation_side="left"),
    "too long": completion("one two " * 300),
    "too long in characters": completion("x" * 40000),
    "salted": completion("Hello", cache_salt="s", echo=True),
}
