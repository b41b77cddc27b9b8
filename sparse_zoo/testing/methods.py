"""All checks for a method, and the ways to run them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from sparse_zoo import registry
from sparse_zoo.attention import Attention
from sparse_zoo.errors import refuse, unknown, unknown_setting
from sparse_zoo.testing import declarations, invariances, learning, parallel, plans, results, robustness, routing
from sparse_zoo.testing.subject import Subject
from sparse_zoo.testing.suite import Check, Checks, Outcome, settle

_themes = (plans, routing, results, learning, invariances, parallel, declarations, robustness)
_all: Checks[Subject] = Checks({name: check for theme in _themes for name, check in theme.checks.items()})


def checks() -> dict[str, Check[Subject]]:
    """All checks for a method, by name, in the order they run."""
    return dict(_all)


def run_checks(
    method: str | type[Attention],
    *,
    known_failures: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    **settings: Any,
) -> Iterator[Outcome]:
    """The outcome of each check, one by one as they end; if the method cannot be built, of that check alone.

    Args:
        method: A registered name, or a class; settings are those of its `small`, changed by `settings`.
        known_failures: Reasons by name of check: such a failure is "known", and one that passes fails.
        only: Names of checks to run; all, when not given.
        **settings: Settings of the method, instead of those of its `small`.

    Yields:
        One outcome a check, as soon as it is known.

    Raises:
        ZooError: For unknown methods, settings and checks.
    """
    subject = _subject(method, settings)
    yield from _all.run(subject.name, subject, known_failures=known_failures, only=only, first=plans.builds.__name__)


def check_method(
    method: str | type[Attention],
    *,
    known_failures: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    **settings: Any,
) -> list[Outcome]:
    """Run every check on a method; raise one `ConformanceError` that lists all failures. Arguments as `run_checks`."""
    return settle(run_checks(method, known_failures=known_failures, only=only, **settings))


def parametrize_methods(
    *methods: str | type[Attention], known_failures: Mapping[str, Mapping[str, str]] | None = None
) -> Callable[..., Any]:
    """Decorator for pytest: one item for each check of each method (all registered ones, when none are named).

        @sparse_zoo.testing.parametrize_methods()
        def test_methods_conform(check):
            check()

    An item fails with what was expected, what came and what to change; it is skipped for the reason the method
    declares, and an expected failure where `known_failures`, by method and check, gives a reason.
    """
    import pytest

    known = dict(known_failures or {})
    judged = {_subject(method, {}).name: method for method in methods or registry.names()}
    refuse(
        "known_failures",
        [unknown("method", name, judged) for name in known if name not in judged]
        + [unknown("check", name, _all) for reasons in known.values() for name in reasons if name not in _all],
    )

    def item(method: str | type[Attention], name: str, reasons: Mapping[str, str]) -> Callable[[], None]:
        def run() -> None:
            mine = {name: reasons[name]} if name in reasons else {}
            (outcome,) = check_method(method, only=[name], known_failures=mine)
            if outcome.status == "skipped":
                pytest.skip(outcome.reason)
            if outcome.status == "known":
                pytest.xfail(outcome.reason)

        return run

    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(item(method, check, known.get(name, {})), id=f"{name}-{check}")
            for name, method in judged.items()
            for check in _all
        ],
    )


def _subject(method: str | type[Attention], settings: Mapping[str, Any]) -> Subject:
    if isinstance(method, str):
        cls, allowed = registry.get(method), registry.settings(method)
        refuse(method, [unknown_setting(key, allowed) for key in settings if key not in allowed])
        return Subject(method, cls, dict(settings))
    refuse(
        "sparse_zoo.testing",
        [f"a method is a name or a subclass of sparse_zoo.Attention, got {method!r}"]
        if not (isinstance(method, type) and issubclass(method, Attention))
        else [],
    )
    known = [name for name in registry.names() if registry.get(name) is method]
    return Subject(known[0] if known else method.__name__, method, dict(settings))
