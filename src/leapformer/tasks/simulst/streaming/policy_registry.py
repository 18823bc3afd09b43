"""The policies that the commands know: their names, their options, and the one way from text to a policy.

Adding one is its class, in a file of its own, and an entry here; the options of `leapformer translate` and `evaluate`,
the agent for SimulEval and the table in docs/simulst.md come from it. Nothing heavy is imported before a policy is
made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from leapformer.errors import LeapformerError
from leapformer.files.showing import shown

if TYPE_CHECKING:
    from leapformer.tasks.simulst.streaming.policy_requests import Policy

_NOUNS = {int: ("an integer", "integers"), float: ("a number", "numbers")}


@dataclass(frozen=True)
class Option:
    """A number that a policy takes.

    Attributes:
        name: of the option of a command, a name of Python too.
        help: what it is.
        default: where it is not given.
        least, most: the smallest and the largest that it may be.
        kind: int or float.
        argument: of the class, where that has another name.
        none: what 0 stands for where the class takes None as well; a curve of this option ends with None.
    """

    name: str
    help: str
    default: Any
    least: float
    most: float = 9_999_999
    kind: type = int
    argument: str = ""
    none: str = ""

    @property
    def flag(self) -> str:
        """The option of a command."""
        return f"--{self.name.replace('_', '-')}"

    def described(self, *, in_a_list: bool = False) -> str:
        """For a person: what it is, what 0 is where it may be, and its default."""
        none = f"0: {self.none}; " if self.none and not in_a_list else ""
        return f"{self.help}; {none}default {self.default}"

    def value(self, text: str) -> Any:
        """One value. Raises LeapformerError for anything else."""
        value = self._number(text)
        if self.none and value == 0:
            return None
        if not self._allows(value):
            least = 0 if self.none else self.least
            raise self._fault(f"{_NOUNS[self.kind][0]} from {least} on, up to {self.most:,}", text)
        return value

    def values(self, text: str) -> list[Any]:
        """Values with commas between, each once, as the points of a curve. Raises LeapformerError for anything else."""
        found = {part: self._number(part) for part in text.split(",")}
        for part, value in found.items():
            if not self._allows(value):
                expected = f"{_NOUNS[self.kind][1]} from {self.least} on with commas between, up to {self.most:,}"
                raise self._fault(expected, part)
        return [*dict.fromkeys(found.values()), *self._ends]

    @property
    def usual(self) -> list[Any]:
        """The values of a curve where none are given."""
        return [self.default, *(end for end in self._ends if end != self.default)]

    @property
    def _ends(self) -> list[None]:
        return [None] if self.none else []

    def _number(self, text: str) -> Any:
        """What a text says, or None; of digits and one point alone, so that it is finite and not negative."""
        text = text.strip()
        whole, point, rest = text.partition(".")
        digits = (whole + rest).isascii() and (whole + rest).isdecimal()
        return self.kind(text) if digits and len(text) < 20 and (not point or self.kind is float) else None

    def _allows(self, value: Any) -> bool:
        return value is not None and self.least <= value <= self.most

    def _fault(self, expected: str, text: str) -> LeapformerError:
        return LeapformerError(f"{self.flag}: expected {expected}, found {shown(text.strip())}")


@dataclass(frozen=True)
class PolicyEntry:
    """A policy that the commands know.

    Attributes:
        name: on the command line.
        home: "module:class".
        options: the first is the one that a curve goes along. Policies that share an option's name share the command's.
        writes, sees, takes: what the documentation says: when it writes, what the decoder sees, what it computes.
        is_trained: whether it is that of the training, wait-k: its points are the run's own curve, and whole utterances
            are computed at once (`evaluation.simulate`).
    """

    name: str
    home: str
    options: tuple[Option, ...]
    writes: str
    sees: str
    takes: str
    is_trained: bool = False

    def make(self, **values: Any) -> Policy:
        """The policy with some values by the names of the options, the others being their defaults.

        Raises LeapformerError where the policy refuses one.
        """
        module, _, name = self.home.partition(":")
        arguments = {option.argument or option.name: values.get(option.name, option.default) for option in self.options}
        try:
            return getattr(import_module(module), name)(**arguments)
        except ValueError as error:
            raise LeapformerError(f"--policy {self.name}: {error}") from None


DEFAULT = "wait-k"
_POLICIES = "leapformer.tasks.simulst.streaming.policies"
POLICIES = {
    entry.name: entry
    for entry in (
        PolicyEntry(
            "wait-k",
            f"{_POLICIES}:WaitK",
            (Option("k", "chunks to read before the first word", 5, 1, none="everything"),),
            writes="nothing for k chunks, then a token a chunk, the rest at the end",
            sees="the first k + i chunks for token i, as in training",
            takes="one step a token",
            is_trained=True,
        ),
        PolicyEntry(
            "local-agreement",
            f"{_POLICIES}:LocalAgreement",
            (
                Option("agreement", "translations that have to agree", 2, 2, 100, argument="n"),
                Option("ahead", "most tokens of a translation beyond those that are written", 40, 1),
            ),
            writes="what the last n translations of all that was read begin with alike",
            sees="all that was read",
            takes="a translation anew for each chunk",
        ),
        PolicyEntry(
            "align-att",
            f"{_POLICIES}:AlignAtt",
            (Option("frames", "chunks that the attention has to lie before the last one", 1, 1),),
            writes="as long as the next token's attention is largest on a chunk at least `frames` before the last",
            sees="all that was read",
            takes="a step for each token, and one more for each chunk",
        ),
    )
}


@dataclass(frozen=True)
class PolicyLine:
    """A policy with some values of its first option, the points of a curve.

    Attributes:
        fixed: the other options that were given. values: of the first option; [None] where there is none.
    """

    entry: PolicyEntry
    fixed: Mapping[str, Any]
    values: tuple[Any, ...]

    @property
    def option(self) -> str:
        """The name of the option that the points differ in, or ""."""
        return self.entry.options[0].name if self.entry.options else ""

    @property
    def label(self) -> str:
        """The policy and what is fixed, such as "local-agreement ahead=10"."""
        return " ".join([self.entry.name, *(f"{name}={value}" for name, value in self.fixed.items())])

    def policy(self, value: Any) -> Policy:
        """That of one point."""
        return self.entry.make(**self.fixed, **({self.option: value} if self.option else {}))


def entry_of(name: str) -> PolicyEntry:
    """The policy of that name. Raises LeapformerError, with those that there are, for another."""
    if name not in POLICIES:
        raise LeapformerError(f"--policy: expected one of {', '.join(POLICIES)}, found {shown(name)}")
    return POLICIES[name]


def all_options() -> dict[str, list[tuple[PolicyEntry, Option]]]:
    """The options of all policies by name, each with the policies that have it."""
    found: dict[str, list[tuple[PolicyEntry, Option]]] = {}
    for entry in POLICIES.values():
        for option in entry.options:
            found.setdefault(option.name, []).append((entry, option))
    return found


def parse_policy(name: str, given: Mapping[str, str | None]) -> Policy:
    """The policy that a command asks for.

    Arguments:
        given: its options as they were written; None: not given.

    Raises:
        LeapformerError: there is no such policy, or it does not have such an option or value.
    """
    entry = entry_of(name)
    return entry.make(**{option.name: option.value(text) for option, text in _given(entry, entry.options, given)})


def parse_line(name: str, given: Mapping[str, str | None]) -> PolicyLine:
    """The same for an evaluation, which takes several values of the first option, with commas between."""
    entry = entry_of(name)
    main, others = entry.options[:1], entry.options[1:]
    fixed = {option.name: option.value(text) for option, text in _given(entry, others, given)}
    several = [option.values(text) for option, text in _given(entry, main, given)]
    usual = [option.usual for option in main] or [[None]]
    line = PolicyLine(entry, fixed, tuple((several or usual)[0]))
    for value in line.values:
        line.policy(value)  # what the policy refuses is told before a model is loaded
    return line


def _given(entry: PolicyEntry, wanted: Iterable[Option], given: Mapping[str, str | None]) -> list[tuple[Option, str]]:
    """Those of the wanted options that were given. Raises LeapformerError where an option of another policy was."""
    known = {option.name: option.flag for option in entry.options}
    for name, text in given.items():
        if text is not None and name not in known:
            expected = (
                f"an option of {entry.name} ({', '.join(known.values())})" if known else f"none with {entry.name}"
            )
            raise LeapformerError(f"--{name.replace('_', '-')}: expected {expected}, found one of another policy")
    return [(option, text) for option in wanted if (text := given.get(option.name)) is not None]
