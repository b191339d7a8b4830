# Copyright 2026 The miras-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The chat template of [`MirasTokenizer`]: turns, tools and tool calls.

A turn is `<|turn|>`, the role, a line end, the text and `<|eos|>`, the eos that ends a document, too, so that `generate`
stops after a reply with nothing configured. Roles are `system`, `user`, `assistant` and `tool`. Tools stand in the first
turn, and calls in the turn of the assistant, in the words and tags of Hermes and Qwen:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>

A `tool` turn is the result of one call, in the order of the calls. Everything that the assistant says is inside
`{% generation %}`, for losses of replies alone: text, calls and the eos.

What the template has no words for is refused with a `jinja2.TemplateError` that names it: other roles, other fields of a
message, images and other parts that are not text, documents, a message that says nothing. Dropped in silence, it would
be missing from what a model is trained on.
"""

# Fields that say nothing pass: in a data set's rows, what a message lacks is null. Transformers itself gives reasoning a
# second name, in front: the one of the message comes last.
CHAT_TEMPLATE = """\
{%- set fields = {
    "system": ["role", "content"],
    "user": ["role", "content"],
    "assistant": ["role", "content", "tool_calls"],
    "tool": ["role", "content", "name", "tool_call_id"],
} -%}
{%- macro text(content, where) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content is sequence and content is not mapping -%}
{%- for part in content -%}
{%- if part is not mapping or part.type != "text" or part.text is not string -%}
{{- raise_exception("`content` of " ~ where ~ " must be a string or a list of parts of type 'text', got a part "
    ~ ((part.type if part is mapping else part) | string | tojson) ~ ": these models read text only.") -}}
{%- endif -%}
{{- part.text -}}
{%- endfor -%}
{%- else -%}
{{- raise_exception("`content` of " ~ where ~ " must be a string or a list of parts of type 'text'.") -}}
{%- endif -%}
{%- endmacro -%}
{%- macro call_text(call, where) -%}
{%- set function = call.function if call.function is mapping else call -%}
{%- if function.name is not string or call.type | default("function", true) != "function" -%}
{{- raise_exception("`tool_calls` of " ~ where ~ " must hold calls of functions with a `name`.") -}}
{%- endif -%}
{%- set arguments = function.arguments | default({}, true) -%}
{%- if arguments is string and arguments.strip().startswith("{") -%}
{%- set arguments = arguments.strip() -%}
{%- elif arguments is mapping -%}
{%- set arguments = arguments | tojson -%}
{%- else -%}
{{- raise_exception("`arguments` of the call of '" ~ function.name ~ "' in " ~ where ~ " must be a mapping, or a string"
    ~ " that holds a JSON object, got " ~ (arguments | string | tojson) ~ ".") -}}
{%- endif -%}
{{- '<tool_call>\\n{"name": ' ~ (function.name | tojson) ~ ', "arguments": ' ~ arguments ~ '}\\n</tool_call>' -}}
{%- endmacro -%}
{%- macro tools_text() -%}
{{- "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function "
    ~ "signatures within <tools></tools> XML tags:\\n<tools>" -}}
{%- for tool in tools -%}{{- "\\n" ~ (tool | tojson) -}}{%- endfor -%}
{{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    ~ '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n'
    ~ "</tool_call>" -}}
{%- endmacro -%}
{%- if documents -%}
{{- raise_exception("`documents` have no place in this chat template: put their text into a message.") -}}
{%- endif -%}
{{- bos_token -}}
{%- if tools and messages[0].role != "system" -%}
{{- "<|turn|>system\\n" ~ tools_text() ~ eos_token -}}
{%- endif -%}
{%- set ns = namespace(calls=[], answered=0) -%}
{%- for message in messages -%}
{%- set where = "message " ~ loop.index0 -%}
{%- if message.role not in fields | list -%}
{{- raise_exception("`role` of " ~ where ~ " must be one of " ~ (fields | join(", ")) ~ ", got "
    ~ (message.role | string | tojson) ~ ".") -}}
{%- endif -%}
{%- for field in message | list | reverse if field not in fields[message.role] -%}
{%- if message[field] is not none and message[field] not in ["", [], {}] -%}
{{- raise_exception("`" ~ field ~ "` of " ~ where ~ " has no place in this chat template: a message of role '"
    ~ message.role ~ "' has " ~ (fields[message.role] | join(", ")) ~ ".") -}}
{%- endif -%}
{%- endfor -%}
{%- set calls = message.tool_calls | default([], true) -%}
{%- set content = message.content | default([], true) if message.content is not string else message.content -%}
{%- if content == [] and not calls -%}
{{- raise_exception("`content` of " ~ where ~ " must be given: " ~ ("an assistant says something, or has `tool_calls`."
    if message.role == "assistant" else "a message of role '" ~ message.role ~ "' says something.")) -}}
{%- endif -%}
{%- set said = text(content, where) -%}
{{- "<|turn|>" ~ message.role ~ "\\n" -}}
{%- if message.role == "assistant" -%}
{%- set ns.calls = calls -%}
{%- set ns.answered = 0 -%}
{% generation %}
{{- said -}}
{%- for call in calls -%}{{- ("\\n" if said or not loop.first else "") ~ call_text(call, where) -}}{%- endfor -%}
{{- eos_token -}}
{% endgeneration %}
{%- else -%}
{%- if message.role == "tool" -%}
{%- if ns.answered < ns.calls | length -%}
{%- set call = ns.calls[ns.answered] -%}
{%- set name = (call.function if call.function is mapping else call).name -%}
{%- if (message.name or name) != name or (message.tool_call_id or call.id) != (call.id or message.tool_call_id) -%}
{{- raise_exception("`name` and `tool_call_id` of " ~ where ~ " must be those of call " ~ ns.answered ~ " of the "
    ~ "assistant, '" ~ name ~ "': results are told apart by their order, which must be that of the calls.") -}}
{%- endif -%}
{%- set ns.answered = ns.answered + 1 -%}
{%- endif -%}
{%- elif tools and loop.first and message.role == "system" -%}
{%- set said = said ~ ("\\n\\n" if said else "") ~ tools_text() -%}
{%- endif -%}
{{- said ~ eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|turn|>assistant\\n" -}}{%- endif -%}
"""

__all__ = ["CHAT_TEMPLATE"]
