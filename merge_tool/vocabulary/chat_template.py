"""A recipe's chat template: by name, as Jinja text, or the one that most models have; and the files that contain it.
Strings only: no template is run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.errors import CheckpointError, RecipeError, shown
from merge_tool.models.side_files import SideFile, SideFiles, with_member
from merge_tool.recipe.recipe import Recipe
from merge_tool.recipe.templates import TEMPLATE_TOKENS, TEMPLATES

FILE, CONFIG, OLD_FILE = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
_LARGEST = 1_000_000  # bytes


def choose_template(recipe: Recipe, models: Sequence[Checkpoint]) -> str | None:
    """The text of the template that the recipe chooses. `auto` is the template of most models; of several that as many
    models have, the first model's counts. None if it is `auto` and no model has one. Raises RecipeError for a name that
    no model and no template has.
    """
    choice, first = recipe.options.chat_template or recipe.chat_template or "", recipe.first
    if choice != "auto":
        if choice in TEMPLATES or "{" in choice:
            return TEMPLATES.get(choice, choice)
        if (number := recipe.number_of(choice)) is not None:
            if (text := template_of(models[number].tokenizer_folder)) is not None:
                return text
            raise RecipeError(f"--chat-template {shown(choice)}: {models[number].name} has no chat template.")
        raise RecipeError(
            f"--chat-template is '{shown(choice)}', expected a model ({', '.join(recipe.known_models)}), auto, one of "
            f"{', '.join(TEMPLATES)}, or a file with a template in Jinja."
        )
    templates = [template_of(model.tokenizer_folder) for model in models]
    texts = [text.strip() for text in (templates[first], *templates) if text and text.strip()]
    own = (templates[first] or "").strip()
    return max(texts, key=lambda text: (texts.count(text) - (text == own), text == own), default=None)


def template_of(folder: Folder | None) -> str | None:
    """The template of a folder's tokenizer; of several, the one named default."""
    if folder is None:
        return None
    if folder.has(FILE):
        return _text(folder, FILE)
    for name in (CONFIG, OLD_FILE):
        template = folder.load_json(name).get("chat_template") if folder.has(name) else None
        if isinstance(template, list):
            named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def _text(folder: Folder, name: str) -> str:
    if folder.size(name) > _LARGEST:
        raise CheckpointError(f"{folder.name}/{name}: has more than {_LARGEST:,} bytes; that is no template.")
    try:
        return folder.read(name).decode()
    except UnicodeDecodeError as e:
        raise folder.unreadable(name, e) from e


def with_template(side_files: SideFiles, text: str) -> SideFiles:
    """The side files with this template in place of theirs: in chat_template.jinja, and also in tokenizer_config.json
    if it has a template."""
    copied = [file for file in side_files.copied if file.target not in (FILE, OLD_FILE)]
    content = text.encode("utf-8", "surrogatepass")
    copied.append(SideFile(FILE, FILE, len(content), content=content))
    return replace(side_files, copied=tuple(_edited(side_files, file, text) for file in copied))


def _edited(side_files: SideFiles, file: SideFile, text: str) -> SideFile:
    folder = file.folder or side_files.folder
    if file.source != CONFIG or folder is None or "chat_template" not in folder.load_json(CONFIG):
        return file
    content = with_member(folder.read(CONFIG), "chat_template", text)
    return replace(file, content=content, size=len(content))


def template_warnings(text: str, side_files: SideFiles) -> Iterator[str]:
    """Warnings about the tokens that a chat template writes and the output's tokenizer lacks: those of a known
    template, and whatever is spelled <|like this|>."""
    name = next((name for name, known in TEMPLATES.items() if known == text), "the template")
    tokens = TEMPLATE_TOKENS.get(name) or tuple(dict.fromkeys(_TOKEN.findall(text)))
    tokenizer = next((file for file in side_files.copied if file.target == "tokenizer.json"), None)
    if not tokens or tokenizer is None:
        return
    content = b"".join(side_files.read(tokenizer, None))
    if lacking := [token for token in tokens if not any(word in content for word in _spellings(token))]:
        yield f"chat_template: {name} writes {', '.join(lacking)}, which are no tokens of the output's tokenizer."


_TOKEN = re.compile(r"<\|[A-Za-z0-9_ -]{1,40}\|>")


def _spellings(token: str) -> set[bytes]:
    """A token as JSON may write it."""
    return {json.dumps(token, ensure_ascii=is_ascii).encode() for is_ascii in (True, False)}
