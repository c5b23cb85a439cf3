"""The drawing styles of the emoji set: where each comes from, its licence, its words; and how npm fetches it.

Every version is pinned, so that two builds on two machines draw the same pictures. A style that belongs to no
flag is in the default set; those are all free of share-alike terms. The other styles are added by name.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Style:
    """One drawing style: a package, how to read it, and the words that name it in captions."""

    name: str  # folder name and `style` field
    kind: Literal["iconify", "webp", "font", "svg"]  # how the pictures are stored
    package: str  # npm package; "" for a font of the system
    version: str  # pinned npm version; "" for a font of the system
    path: str  # the file or folder inside the package
    family: str  # styles of one family render the same drawings
    words: tuple[str, str]  # what captions call it; the first is the primary word
    is_colour: bool
    licence: str  # SPDX id where there is one
    credit: str  # title, author, address: the attribution
    flag: str | None = None  # None: default set
    oversampling: int = 1  # drawn this much larger, then averaged
    borrowed: tuple[str, str] | None = (
        None  # (prefix, family): drawings whose names start so are that family's
    )

    def family_of(self, name: str) -> str:
        """Return the family whose drawing the picture called `name` shows."""
        if self.borrowed is not None and name.startswith(self.borrowed[0]):
            return self.borrowed[1]
        return self.family


def _iconify(
    name: str,
    version: str,
    family: str,
    words: tuple[str, str],
    licence: str,
    credit: str,
    *,
    is_colour: bool = True,
) -> Style:
    package = f"@iconify-json/{name}"
    return Style(name, "iconify", package, version, "icons.json", family, words, is_colour, licence, credit)


_NOTO = "Noto Emoji, Google, https://github.com/googlefonts/noto-emoji"
_FLUENT = "Fluent Emoji, Microsoft Corporation, https://github.com/microsoft/fluentui-emoji"
_EMOJIONE = "EmojiOne 2.x, Ranks.com Inc. and EmojiTwo, https://github.com/EmojiTwo/emojitwo"
_OPENMOJI = "OpenMoji, HfG Schwäbisch Gmünd, https://openmoji.org"

# The order is part of the data: of two pictures with the same bytes, the one of the earlier style stays.
STYLES: tuple[Style, ...] = (
    _iconify("noto", "1.2.9", "noto", ("noto", "google noto"), "Apache-2.0", _NOTO),
    # Its letters are noto's drawings at another size: 0.03 to 0.06 apart at 16 x 16 RGB.
    replace(
        _iconify(
            "noto-v1", "1.2.5", "noto-v1", ("noto blob", "google blob"), "Apache-2.0", _NOTO + " (v1, blobs)"
        ),
        borrowed=("letter-", "noto"),
    ),
    _iconify(
        "twemoji",
        "1.2.5",
        "twemoji",
        ("twemoji", "flat twitter"),
        "CC-BY-4.0",
        "Twemoji, Twitter Inc. and contributors, https://github.com/jdecked/twemoji",
    ),
    # Its shadow filters harden the alpha of the edges: at twice the size, then averaged, they are smooth.
    replace(
        _iconify("fluent-emoji", "1.2.7", "fluent", ("fluent", "glossy fluent"), "MIT", _FLUENT),
        oversampling=2,
    ),
    _iconify(
        "fluent-emoji-flat", "1.2.6", "fluent", ("flat fluent", "fluent flat"), "MIT", _FLUENT + " (flat)"
    ),
    _iconify(
        "fluent-emoji-high-contrast",
        "1.2.6",
        "fluent",
        ("high contrast", "fluent high contrast"),
        "MIT",
        _FLUENT + " (high contrast)",
        is_colour=False,
    ),
    Style(
        "fluent-3d",
        "webp",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "assets",
        "fluent",
        ("3d", "3d fluent"),
        True,
        "MIT",
        _FLUENT + " (3D; packaged by LobeHub)",
    ),
    _iconify("emojione", "1.2.3", "emojione", ("emojione", "flat emojione"), "CC-BY-4.0", _EMOJIONE),
    _iconify(
        "emojione-monotone",
        "1.2.1",
        "emojione",
        ("monotone", "black monotone emojione"),
        "CC-BY-4.0",
        _EMOJIONE + " (monotone)",
        is_colour=False,
    ),
    _iconify(
        "fxemoji",
        "1.2.2",
        "fxemoji",
        ("firefox", "firefox os"),
        "Apache-2.0",
        "Firefox OS Emoji, Mozilla, https://github.com/mozilla/fxemoji",
    ),
    _iconify(
        "streamline-emojis",
        "1.2.4",
        "streamline",
        ("streamline", "streamline outline"),
        "CC-BY-4.0",
        "Streamline Emojis, Streamline, https://streamlinehq.com",
    ),
    Style(
        "noto-mono",
        "font",
        "@expo-google-fonts/noto-emoji",
        "0.4.7",
        "500Medium/NotoEmoji_500Medium.ttf",
        "noto-mono",
        ("noto outline", "noto monochrome"),
        False,
        "OFL-1.1",
        "Noto Emoji (font), Google, https://fonts.google.com/noto/specimen/Noto+Emoji",
    ),
    Style(
        "openmoji",
        "svg",
        "openmoji",
        "17.0.0",
        "color/svg",
        "openmoji",
        ("openmoji", "outlined openmoji"),
        True,
        "CC-BY-SA-4.0",
        _OPENMOJI,
        flag="openmoji",
    ),
    Style(
        "openmoji-black",
        "svg",
        "openmoji",
        "17.0.0",
        "black/svg",
        "openmoji",
        ("black line art", "openmoji line art"),
        False,
        "CC-BY-SA-4.0",
        _OPENMOJI + " (black)",
        flag="openmoji-black",
    ),
    Style(
        "emojione-v1",
        "iconify",
        "@iconify-json/emojione-v1",
        "1.2.3",
        "icons.json",
        "emojione-v1",
        ("old emojione", "emojione v1"),
        True,
        "CC-BY-SA-4.0",
        "EmojiOne 1.x, Ranks.com Inc., https://github.com/joypixels/emojione-legacy",
        flag="emojione-v1",
    ),
    Style(
        "symbola",
        "font",
        "",
        "",
        "Symbola*.ttf",
        "symbola",
        ("symbola", "symbola glyph"),
        False,
        "LicenseRef-Symbola-free-for-any-use",
        "Symbola, George Douros, https://dn-works.com/ufas/",
        flag="symbola",
    ),
)
DEFAULT_STYLES = tuple(style for style in STYLES if style.flag is None)
FLAGS = tuple(style.flag for style in STYLES if style.flag is not None)
NAMES_PACKAGE = ("emojibase-data", "17.0.0")  # CLDR names, keywords and groups; MIT
_SYSTEM_FONTS = Path("/usr/share/fonts")


def select_styles(extra: Sequence[str]) -> tuple[tuple[Style, ...], Path | None]:
    """Return the default styles and those that `extra` names, in order, and the Symbola font file.

    `extra` holds flags of FLAGS; `symbola=FILE` names the font, plain `symbola` looks under /usr/share/fonts.
    Raises ValueError for an unknown flag or a font that is not there.
    """
    wanted = {flag.partition("=")[0] for flag in extra}
    unknown = sorted(wanted - set(FLAGS))
    if unknown:
        raise ValueError(
            f"unknown emoji set {unknown[0]!r}; the sets that can be added are {', '.join(FLAGS)}"
        )
    font: Path | None = None
    if "symbola" in wanted:
        given = [flag.partition("=")[2] for flag in extra if flag.startswith("symbola=")]
        font = _find_symbola(Path(given[0]) if given else None)
    return tuple(style for style in STYLES if style.flag is None or style.flag in wanted), font


def _find_symbola(given: Path | None) -> Path:
    if given is not None:
        if not given.is_file():
            raise ValueError(f"no font file at {given}: give the path of a Symbola .ttf as symbola=FILE")
        return given
    found = sorted(_SYSTEM_FONTS.rglob("Symbola*.ttf"))
    if not found:
        raise ValueError(
            f"no Symbola*.ttf under {_SYSTEM_FONTS}: install it (Debian: fonts-symbola) or give symbola=FILE"
        )
    return found[0]


def needed_packages(styles: Iterable[Style]) -> dict[str, str]:
    """Return npm package name -> pinned version for the styles and for the emoji names."""
    packages = {style.package: style.version for style in styles if style.package}
    return dict([NAMES_PACKAGE]) | packages


def cache_folder() -> Path:
    """Return the folder for downloaded packages: $DALLE_CACHE, else the platform's cache folder + `dalle`."""
    if chosen := os.environ.get("DALLE_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dalle"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "dalle" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle"


def missing_packages(npm_folder: Path, packages: dict[str, str]) -> list[str]:
    """Return `name@version` of every package that the node_modules folder lacks in exactly that version."""
    missing = []
    for name, version in packages.items():
        manifest = npm_folder / name / "package.json"
        try:
            found = json.loads(manifest.read_text(encoding="utf-8")).get("version")
        except (OSError, ValueError):
            found = None
        if found != version:
            missing.append(f"{name}@{version}")
    return missing


def check_packages(npm_folder: Path, styles: Iterable[Style]) -> Path:
    """Return the given node_modules folder; raise ValueError that names the packages of the styles it lacks."""
    return require_packages(npm_folder, needed_packages(styles))


def require_packages(npm_folder: Path, packages: dict[str, str]) -> Path:
    """Return the given node_modules folder; raise ValueError that names the packages it lacks."""
    missing = missing_packages(npm_folder, packages)
    if missing:
        raise ValueError(
            f"{npm_folder} lacks {', '.join(missing)}: install these versions there, or give no folder"
        )
    return npm_folder


def fetch_packages(styles: Iterable[Style], progress: Callable[[str], None] | None = None) -> Path:
    """Install the packages of the styles and of the emoji names, see `install_packages`."""
    return install_packages(needed_packages(styles), progress)


def install_packages(packages: dict[str, str], progress: Callable[[str], None] | None = None) -> Path:
    """Install those of the packages (npm name -> version) that the cache lacks; return its node_modules folder.

    No install script of any package runs. Raises ValueError when npm is not there or fails.
    """
    folder = cache_folder() / "npm"
    modules = folder / "node_modules"
    if not missing_packages(modules, packages):
        return modules
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            "npm not found: pictures and fonts come from npm packages; install Node.js, which brings npm"
        )
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "package.json"
    if not manifest.exists():  # without one, npm would look for a project in the parent folders
        manifest.write_text('{"name": "dalle-art-cache", "private": true}\n', encoding="utf-8")
    if progress is not None:
        progress(f"npm: installing {len(packages)} packages into {folder}")
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--save-exact"]
    command += [f"{name}@{version}" for name, version in packages.items()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"npm install failed in {folder}: {_npm_reason(done.stderr or done.stdout)}")
    return require_packages(modules, packages)


def _npm_reason(output: str) -> str:
    """Return the first line of npm's message that says what went wrong; codes precede it, a trace follows."""
    said = [line.strip() for line in output.splitlines() if not line.startswith(("npm warn", "npm notice"))]
    lines = [line.removeprefix("npm error").strip() for line in said]
    codes = ("code ", "syscall ", "path ", "errno ")
    return next((line for line in lines if line and not line.startswith(codes)), "no message")
