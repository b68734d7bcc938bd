"""Keys that trip string handling, and templates with the fields they are filled from."""

from hypothesis import strategies as st

# Numbers and almost numbers, keys that are prefixes of others, braces and stars, and what unicode calls a digit.
ODD = (
    "0",
    "1",
    "10",
    "01",
    "-1",
    "weight",
    "weights",
    "w",
    "w1",
    "ww",
    "{",
    "}",
    "{i}",
    "*",
    "{*r}",
    " ",
    "é",
    "e\u0301",
    "٣",
    "名",
    "\n",
)
FEW = ("a", "b", "w", "0", "1")


def segments(alphabet: tuple[str, ...] = ODD) -> st.SearchStrategy[str]:
    odd = st.sampled_from(alphabet)
    if alphabet is not ODD:
        return odd
    free = st.text(st.characters(exclude_characters=".", exclude_categories=("Cs",)), min_size=1, max_size=4)
    return odd | free


def keys(alphabet: tuple[str, ...] = ODD, max_segments: int = 5) -> st.SearchStrategy[str]:
    return st.lists(segments(alphabet), min_size=1, max_size=max_segments).map(".".join)


@st.composite
def key_sets(draw: st.DrawFn, alphabet: tuple[str, ...] = ODD, max_size: int = 12, max_segments: int = 5) -> list[str]:
    """Distinct keys, among them prefixes, extensions and `.weight` twins of others."""
    found = draw(st.lists(keys(alphabet, max_segments), max_size=max_size))
    for key in list(found):
        match draw(st.integers(0, 3)):
            case 1:
                found.append(key.rpartition(".")[0] or key)
            case 2:
                found += [f"{key}.weight", f"{key}.bias"]
            case 3:
                found.append(key + draw(st.sampled_from(("_", "1", ".0", ".weight.weight"))))
            case _:
                pass
    return list(dict.fromkeys(found))


def escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


@st.composite
def template_texts(
    draw: st.DrawFn,
    fields: tuple[str, ...] | None = None,
    alphabet: tuple[str, ...] = ODD,
    partial: bool = True,
    max_literals: int = 3,
) -> str:
    """A template with these placeholders ("i", "*rest"), in any order, among literal segments."""
    if fields is None:
        fields = draw(placeholder_sets())
    holes = []
    for name in draw(st.permutations(fields)):
        around = ("", "")
        if partial and name[0] != "*":
            text = st.sampled_from(("", "", "w", "0", "-", "{"))
            around = (escaped(draw(text)), escaped(draw(text)))
        holes.append(f"{around[0]}{{{name}}}{around[1]}")
    parts = draw(st.lists(segments(alphabet).map(escaped), min_size=not holes, max_size=max_literals))
    for hole in holes:
        parts.insert(draw(st.integers(0, len(parts))), hole)
    return ".".join(parts)


def placeholder_sets() -> st.SearchStrategy[tuple[str, ...]]:
    single = st.lists(st.sampled_from(("i", "j", "expert_id", "名")), unique=True, max_size=3)
    return st.tuples(single, st.sampled_from(((), ("*rest",)))).map(lambda both: (*both[0], *both[1]))


@st.composite
def filled_templates(draw: st.DrawFn, alphabet: tuple[str, ...] = ODD) -> tuple[str, dict[str, str]]:
    """A template and fields that fit it."""
    fields = draw(placeholder_sets())
    text = draw(template_texts(fields, alphabet))
    return text, {name.lstrip("*"): draw(keys(alphabet) if name[0] == "*" else segments(alphabet)) for name in fields}
