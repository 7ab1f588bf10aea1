"""The colour of each family of models, the same in all figures."""

from __future__ import annotations

# Okabe and Ito's, which the colour-blind can tell apart: text warm, images blue, EOS darker.
COLORS = {
    "gpt2": "#666666",
    "blind": "#E69F00",
    "eos": "#D55E00",
    "valm": "#56B4E9",
    "valm_eos": "#0072B2",
    "random_tower": "#CC79A7",
    "random_tower_eos": "#7A2F5B",
    "shuffled": "#009E73",
    "shuffled_eos": "#00503A",
}
