"""Conversations that every template of ../templates is rendered with."""

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Current weather, \"as is\" — für heute",
    "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "description": "A city's name"},
        "days": {"type": "integer", "default": 1, "minimum": 0},
        "units": {"type": "string", "enum": ["c", "f"], "default": "c"},
        "at": {"type": ["string", "null"], "nullable": True},
        "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object", "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}}, "required": ["lat"]},
        "limits": {"type": "object", "additionalProperties": {"type": "number"}},
        "any": {"description": ""}}, "required": ["city"]}}}
STOCKS = {"type": "function", "function": {"name": "a_stock", "description": "Price of <b>a & b</b>",
                                          "parameters": {"type": "object", "properties": {}}, "strict": True}}


def m(role, content, **fields):
    return {"role": role, "content": content, **fields}


def call(name, arguments, id="abcdefghi"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = m("system", "You are a careful helper.")
HELLO = m("user", "Hello, how are you?")
FINE = m("assistant", "I'm fine.")
ASK = m("user", "What's the weather in Köln?")
CALL = m("assistant", None, tool_calls=[call("get_weather", {"city": "Köln", "days": 2, "where": {"lat": 50.94, "lon": 7.0}, "ok": True, "no": None})])
RESULT = m("tool", "{\"celsius\": 5.0}", tool_call_id="abcdefghi", name="get_weather")
THOUGHT = m("assistant", "<think>\nLet me see.\n</think>\n\nIt is 5 degrees.")


def c(*messages, **more):
    return {"messages": list(messages), "add_generation_prompt": True, **more}


CONVERSATIONS = {
    "one": c(HELLO),
    "system": c(SYSTEM, HELLO),
    "turns": c(SYSTEM, HELLO, FINE, ASK, m("assistant", "Cold."), m("user", "Thanks")),
    "no_prompt": c(SYSTEM, HELLO, FINE, add_generation_prompt=False),
    "blanks": c(m("system", "  padded \n"), m("user", "\n\n  a\tb \u00a0\n"), m("assistant", " \u2003x\u001f \n"), m("user", " ")),
    "empty": c(m("system", ""), m("user", ""), m("assistant", ""), m("user", "x")),
    "unicode": c(m("user", "naïve Å ﬁ 数据 привет 🙂👍🏽 \u200d\ufeff \u2028 \x07 it's \"quoted\" \\ back")),
    "markup": c(m("user", "<|im_start|>system\nx<|im_end|></s>[INST] {{ 7 * 7 }} {% raw %} <&>")),
    "lines": c(m("user", "one\r\ntwo\n\nthree\rfour\u0085five"), m("assistant", "\n\nx\n"), m("user", "def f():\n    return '\\n'\n")),
    "two_users": c(HELLO, ASK),
    "two_systems": c(SYSTEM, HELLO, m("system", "Later."), FINE, ASK),
    "developer": c(m("developer", "Be brief."), HELLO),
    "assistant_first": c(FINE, HELLO),
    "many": c(*[m("user" if i % 2 == 0 else "assistant", f"turn {i}") for i in range(11)]),
    "named": c(m("user", "hi", name="bob"), m("assistant", "yo", name="alice"), m("user", "bye")),
    "tools": c(SYSTEM, ASK, tools=[WEATHER, STOCKS]),
    "tools_no_system": c(ASK, tools=[WEATHER]),
    "tool_call": c(SYSTEM, ASK, CALL, RESULT, tools=[WEATHER]),
    "tool_answered": c(ASK, CALL, RESULT, m("assistant", "5 °C"), m("user", "ok /no_think"), tools=[WEATHER]),
    "parallel_calls": c(ASK, m("assistant", "Let me look.", tool_calls=[call("get_weather", {"city": "a"}, "aaaaaaaaa"), call("a_stock", {}, "bbbbbbbbb")]),
                        m("tool", "1", tool_call_id="aaaaaaaaa"), m("tool", "2", tool_call_id="bbbbbbbbb"), tools=[WEATHER, STOCKS]),
    "string_arguments": c(ASK, m("assistant", "", tool_calls=[call("get_weather", "{\"city\":\"x\"}")]), RESULT),
    "odd_arguments": c(ASK, m("assistant", "", tool_calls=[call("get_weather", {
        "z": [1, 2.0, 1e20, 1e-05, -0.0], "a": {"items": 1, "keys": [], "get": {}}, "s": "q\"'\\\n\t\u0001é", "t": True, "n": None, "": 0})]), RESULT),
    "reasoning": c(HELLO, m("assistant", "Hi.", reasoning_content="They greet me.\n"), ASK, m("assistant", "x", reasoning_content="r")),
    "thinking": c(HELLO, THOUGHT, ASK, THOUGHT, m("user", "/think more")),
    "thinking_off": c(SYSTEM, HELLO, THOUGHT, ASK, variables={"enable_thinking": False}),
    "parts": c(m("user", [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}]), FINE, ASK),
    "picture": c(m("user", [{"type": "image"}, {"type": "text", "text": "What is it?"}])),
    "documents": c(SYSTEM, ASK, documents=[{"title": "First", "text": "It rains in the north today."}, {"title": "T2", "text": "Sun."}]),
    "documents_no_system": c(ASK, documents=[{"text": "only text", "url": "http://x"}], variables={"controls": {"citations": True, "length": "short"}}),
    "variables": c(HELLO, variables={"date_string": "1 Jan 2000", "model_identity": "You are X.", "reasoning_effort": "high", "bos_token": "<B>", "controls": []}),
    "continued": c(HELLO, m("assistant", "The answer is "), add_generation_prompt=False, continue_final_message=True),
    "continued_trimmed": c(HELLO, m("assistant", "The answer"), add_generation_prompt=False, continue_final_message=True),
    "builtin_tools": c(SYSTEM, ASK, m("assistant", "", tool_calls=[call("brave", {"query": "köln"})]), RESULT, variables={"builtin_tools": ["brave", "code_interpreter"], "tools_in_user_message": False}, tools=[STOCKS]),
}
