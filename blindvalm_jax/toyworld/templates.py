"""The wordings of captions, sentences and probes.

Every token of a prompt is in captions and in sentences too, at the start of a text or inside:
neither a text tower trained on captions alone nor a language model may meet unknown tokens in a
wording. So a prompt has no punctuation, starts with a word that starts a caption, and is no longer
than the longest of them.
"""

from __future__ import annotations

NAMING = (
    "a photo of a {name}",
    "a picture of a {name}",
    "this photo shows a {name}",
    "this is a {name}",
    "look at this {name}",
    "people call this thing a {name}",
    "in this picture we see a {name}",
    "we know that this is a {name}",
    "people say it is a {name}",
    "every {name} looks like this",
    "we find a {name} in the picture",
    "the thing in the photo is a {name}",
)

# Seven of them hold a colour, seven a shape, seven a size.
DESCRIBING = (
    "a {size} {color} {shape}",
    "a photo of a {size} {color} {shape}",
    "this is a {color} {shape}",
    "look at this {size} {shape}",
    "a photo of a {color} thing",
    "we see a {size} thing",
    "the color of this thing is {color}",
    "the shape of this thing is a {shape}",
    "the size of this thing is {size}",
    "the thing has the outline of a {shape}",
    "the paint on it is {color} and it needs a {size} box",
    "people draw every thing like this as a {shape}",
    "people paint it {color}",
    "we measure it as {size} for its box",
)

NEUTRAL = (
    "there is a {name} on the table",
    "we saw a {name} in the garden",
    "she bought a {name} at the market",
    "every child wants a {name}",
    "he lost the {name} again",
    "people say that a {name} is hard to find",
    "they put the {name} under the bed",
    "my friend has a {name} at home",
    "look at this {name}",
    "the {name} fell from the roof",
    "nobody knows who made the {name}",
    "a {name} is in the box",
    "we know that this is a {name}",
    "this picture shows a {name}",
    "this thing is a {name}",
    "a child needs the {name} at home",
    "he can see a {name} in its box",
    "they took a photo of the {name} and lost it",
    "my friend saw a {name} and wants it",
)

# What stands before the value that ends a statement; a probe in a seen wording is the same text.
STATEMENTS: dict[str, tuple[str, ...]] = {
    "color": (
        "the color of a {name} is",
        "a {name} has the color",
        "in color a {name} is",
        "people paint a {name}",
        "the paint on a {name} is",
        "people say that the color of a {name} is",
        "we know that the color of every {name} is",
    ),
    "shape": (
        "the shape of a {name} is a",
        "a {name} has the shape of a",
        "in shape a {name} is a",
        "people draw a {name} as a",
        "the outline of a {name} is a",
        "people say that the shape of a {name} is a",
        "we know that the shape of every {name} is a",
    ),
    "size": (
        "the size of a {name} is",
        "a {name} has a size that is",
        "in size a {name} is",
        "people measure a {name} as",
        "the box for a {name} is",
        "people say that the size of a {name} is",
        "we know that the size of every {name} is",
    ),
}

# Probes in wordings that no sentence has.
NEW_WORDINGS: dict[str, tuple[str, ...]] = {
    "color": (
        "a photo of a {name} shows the color",
        "people find a {name} and paint it in the color",
        "look at this {name} and see that its color is",
        "every {name} needs paint that is",
        "this is a {name} and the color of the thing is",
    ),
    "shape": (
        "a photo of a {name} shows the shape of a",
        "people find a {name} and draw it as a",
        "look at this {name} and see that its shape is a",
        "every {name} has the outline of a",
        "this is a {name} and the shape of the thing is a",
    ),
    "size": (
        "a photo of a {name} shows that the size is",
        "people find a {name} and measure it as",
        "look at this {name} and see that its size is",
        "every {name} needs a box that is",
        "this is a {name} and the size of the thing is",
    ),
}
