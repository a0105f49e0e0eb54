"""Hostile prompts for the command line, which writes them into the PNG."""

from hypothesis import strategies as st

from fuzz.cases import TEXTS, Case, Draw

_PROMPTS = st.one_of(
    TEXTS,
    st.text(max_size=60),
    st.text(st.characters(codec=None, categories=["Cs", "Cc", "Lu", "So"]), max_size=6),
    st.sampled_from(
        ["a\0b", "\r\n", "\x7f\x80\xff", "é\udcff", "\udcc3\udca9", "--seed", "-1", "@file", "red " * 30_000]
    ),
)


@st.composite
def pictures(draw: Draw) -> Case:
    """A picture of a hostile prompt."""
    prompt = draw(_PROMPTS)
    return Case({}, (repr(prompt[:60]),), {"prompt": prompt})
