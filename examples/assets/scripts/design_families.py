"""Which icon collections exist, who designed them, and on which side of the training/evaluation split they stand.

The unit of the split is the *design family*: all collections by one designer or derived from one another. A family is
either used for pretraining or for evaluation, never for both.
"""

ALLOWED_LICENCES = frozenset(
    {
        "MIT",
        "ISC",
        "Apache-2.0",
        "BSD-3-Clause",
        "CC0-1.0",
        "CC-BY-3.0",
        "CC-BY-4.0",
        "Unlicense",
    }
)

# Brand logos, flags, file types and animations do not show the object that their name says.
EXCLUDED_CATEGORIES = frozenset({"Logos", "Programming", "Emoji"})
EXCLUDED_SETS = frozenset(
    {
        # brand logos inside general collections
        "fa-brands",
        "fa6-brands",
        "fa7-brands",
        "bxl",
        # national flags and animations
        "circle-flags",
        "flag",
        "flagpack",
        "cif",
        "svg-spinners",
        "meteocons",
        # the hidden 3D emoji collection (evaluation has its own emoji set)
        "fluent-emoji",
        # UI icons drawn in the style of the emoji vendor that evaluation holds out
        "fluent-color",
        # pixel art by the designers of `mdi` (pretraining); neither side may have it
        "memory",
        # by the designers of `icons8`, `flat-color-icons`, `wpf` (evaluation)
        "la",
    }
)

# Collections that share a designer, or are forks or companions of each other. Any other collection is its own family.
_GROUPS = {
    "material": ("material-symbols", "material-symbols-light", "ic", "mdi", "line-md", "eos-icons"),
    "boxicons": ("boxicons", "bx", "bxs"),
    "mynaui": ("mynaui", "vadivam"),
    "feather": ("lucide", "lucide-lab", "feather"),
    "unicons": ("uil", "uim", "uit", "uis"),
    "halfmann": ("majesticons", "pixelarticons"),
    "mono-icons": ("mi", "mono-icons"),
    "streamline": (
        "streamline",
        "streamline-ultimate",
        "streamline-plump",
        "streamline-sharp",
        "streamline-cyber",
        "streamline-block",
        "streamline-pixel",
        "streamline-freehand",
        "streamline-flex",
        "streamline-color",
        "streamline-ultimate-color",
        "streamline-plump-color",
        "streamline-freehand-color",
        "streamline-kameleon-color",
        "streamline-stickies-color",
        "streamline-flex-color",
        "streamline-sharp-color",
        "streamline-cyber-color",
        "streamline-emojis",
        "guidance",
        "covid",
    ),
    "icon-park": ("icon-park", "icon-park-outline", "icon-park-solid", "icon-park-twotone"),
    "ionicons": ("ion", "famicons"),
    "coreui": ("cil",),
    "fluent-system": ("fluent", "fluent-mdl2", "codicon"),
    "glyphs": ("glyphs", "glyphs-poly"),
    "heroicons": ("heroicons", "heroicons-outline", "heroicons-solid", "sidekickicons", "zondicons"),
    "pepicons": ("pepicons", "pepicons-pop", "pepicons-print", "pepicons-pencil"),
    "fontawesome": ("fa7-solid", "fa7-regular", "fa6-solid", "fa6-regular", "fa-solid", "fa-regular"),
    "icons8": ("icons8", "flat-color-icons", "wpf"),
    "noto": ("noto", "noto-v1"),
    "emojione": ("emojione", "emojione-monotone"),
}
_FAMILY_OF = {prefix: family for family, prefixes in _GROUPS.items() for prefix in prefixes}

PRETRAINING_FAMILIES = frozenset(
    {
        "material",
        "hugeicons",
        "tabler",
        "iconmind",
        "reicon",
        "boxicons",
        "mingcute",
        "feather",
        "ph",
        "ri",
        "fluent-system",
        "solar",
        "mynaui",
        "keyline-icons",
        "fontawesome",
        "griddy-icons",
        "icon-park",
        "bi",
        "glyphs",
        "tdesign",
        "carbon",
        "game-icons",
        "lets-icons",
        "healthicons",
        "iconoir",
        "ix",
    }
)
PRETRAINING_EMOJI_SETS = ("twemoji", "noto", "noto-v1", "fxemoji", "emojione", "emojione-monotone")
EVALUATION_EMOJI_STYLES = {"flat": "fluent-emoji-flat", "high_contrast": "fluent-emoji-high-contrast"}

PIXEL_ART_SETS = frozenset({"pixelarticons", "pixel", "dinkie-icons", "streamline-pixel"})
HAND_DRAWN_SETS = frozenset({"streamline-freehand", "streamline-freehand-color"})
# Two families have both plain sets and sets of another domain; those plain sets are left out of the training shots.


def family_of(prefix: str) -> str:
    """Design family of the collection with this iconify prefix."""
    return _FAMILY_OF.get(prefix, prefix)


def domain_of(prefix: str) -> str:
    """Drawing domain of a collection: "plain", "pixel" or "hand"."""
    if prefix in PIXEL_ART_SETS:
        return "pixel"
    return "hand" if prefix in HAND_DRAWN_SETS else "plain"


def is_icon_set_usable(prefix: str, info: dict) -> bool:
    """Whether a collection has an allowed licence and shows things rather than brands, flags or emoji."""
    return (
        info["license"].get("spdx") in ALLOWED_LICENCES
        and info.get("category") not in EXCLUDED_CATEGORIES
        and prefix not in EXCLUDED_SETS
    )
