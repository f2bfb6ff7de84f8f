"""The study of a search: trials in a journal that several processes share, and who runs which. Optuna's only room."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from sslcells.config import ConfigError
from sslcells.run import checkpoint, lock
from sslcells.tuning.ranges import Range

JOURNAL = "study.log"
_CLAIMS, _TAKING = ".claims", ".taking"
_WAIT = 600.0
"""Seconds to wait for other processes that take a trial."""
_STARTS = 3
"""Starts of a trial without a new checkpoint in between, after which it counts as failed."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Taken(NamedTuple):
    """A trial that this process runs."""

    number: int
    settings: tuple[str, ...]
    """KEY=VALUE for each range"""
    hopeless: str = ""
    """why it is not started again; empty if it is"""

    @property
    def name(self) -> str:
        """Name of its run."""
        return run_name(self.number)


class Done(NamedTuple):
    """A trial of the study as it stands."""

    number: int
    state: str
    """finished, failed or running"""
    value: float | None
    settings: tuple[str, ...]
    reason: str
    """why it failed"""


def run_name(number: int) -> str:
    """Name of a trial's run."""
    return f"trial_{number:04}"


class Study:
    """The trials of a folder. Any number of processes, on any number of hosts, may use one study at a time."""

    def __init__(self, folder: Path, searched: Sequence[Range], seed: int, figure: str) -> None:
        """Open or begin the study in `folder`.

        Raises:
            ConfigError: if the folder cannot be written, or holds a study of other ranges, seed or figure.
        """
        self.folder, self._ranges = folder, {one.key: one for one in searched}
        about = {"search": [str(one) for one in searched], "seed": seed, "figure": figure}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with lock.one_at_a_time(folder / _TAKING, _WAIT):
                self._study = optuna.create_study(
                    storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
                    sampler=_Seeded(seed),
                    study_name="search",
                    direction="maximize",
                    load_if_exists=True,
                )
                before = self._study.user_attrs.get("about")
                if before is None:
                    self._study.set_user_attr("about", about)
        except OSError as error:
            raise ConfigError(f"{folder}: the study cannot be written: {error}") from None
        if before is not None and before != about:
            different = [f"{key}: {before[key]} → {about[key]}" for key in about if before[key] != about[key]]
            raise ConfigError(f"{folder} holds another search ({'; '.join(different)}); choose another name=")
        self._seed = seed
        self._held: dict[int, lock.Lock] = {}

    def take(self, trials: int) -> Taken | None:
        """A trial to run: one whose process is gone, else a new one; None if the study has `trials` already.

        Every start of a trial is noted, so that one that ends its process each time is given up.
        """
        with lock.one_at_a_time(self.folder / _TAKING, _WAIT):
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if self._abandoned(trial.number) and self._hold(trial.number):
                    return self._again(trial)
            if len(self._study.get_trials(deepcopy=False)) >= trials:
                return None
            new = self._study.ask({key: _distribution(one) for key, one in self._ranges.items()})
            held = self._hold(new.number)
        if not held:  # without file locks, another process may have taken it for an abandoned one
            return self.take(trials)
        self._note_start(new.number, None)
        return Taken(new.number, self._words(new.params))

    def finish(self, number: int, value: float) -> None:
        """Record a trial's figure."""
        self._study.tell(number, value)
        self.leave(number)

    def fail(self, number: int, reason: str) -> None:
        """Record that a trial failed, and why."""
        self._study.set_user_attr(f"reason {number}", reason)
        self._study.tell(number, state=TrialState.FAIL)
        self.leave(number)

    def leave(self, number: int) -> None:
        """Let go of a trial; if it is not done, the next process resumes it."""
        if (held := self._held.pop(number, None)) is not None:
            held.release()

    def trials(self) -> list[Done]:
        """All trials, the best first, then those that failed or run."""
        about = self._study.user_attrs
        found = [
            Done(
                trial.number,
                _STATES.get(trial.state, trial.state.name.lower()),
                trial.value if trial.state == TrialState.COMPLETE else None,
                self._words(trial.params),
                about.get(f"reason {trial.number}", ""),
            )
            for trial in self._study.get_trials(deepcopy=False)
        ]
        return sorted(found, key=lambda one: (one.value is None, -(one.value or 0.0), one.number))

    def importance(self) -> dict[str, float]:
        """Share of the figure's variance that each key explains, by fANOVA; empty if too few trials tell."""
        done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(done) < 4 or len({trial.value for trial in done}) < 2:
            return {}
        return get_param_importances(self._study, evaluator=FanovaImportanceEvaluator(seed=self._seed))

    def _again(self, trial: FrozenTrial) -> Taken:
        newest = checkpoint.newest(self.folder / run_name(trial.number) / "checkpoints")
        starts = self._note_start(trial.number, None if newest is None else newest.name)
        why = ""
        if trial.params.keys() != self._ranges.keys():
            why = "its process ended before its settings were drawn"
        elif len(starts) > _STARTS and len({*starts[-_STARTS:]}) == 1:
            why = f"its process ended {_STARTS} times without a new checkpoint: out of memory, or of time?"
        return Taken(trial.number, self._words(trial.params), why)

    def _note_start(self, number: int, newest: str | None) -> list[str | None]:
        """Add a start to those of a trial, with the name of its newest checkpoint; returns all."""
        key = f"starts {number}"
        starts: list[str | None] = [*self._study.user_attrs.get(key, []), newest]
        self._study.set_user_attr(key, starts)
        return starts

    def _abandoned(self, number: int) -> bool:
        """False if the process of a trial lives, as far as that can be told without waiting."""
        try:
            owner = lock.owner(self.folder / _CLAIMS / str(number))
        except (OSError, ValueError):
            return True
        if owner is None:
            return True
        return owner.lives is False or (owner.lives is None and owner.silent > 6 * lock.BEAT)

    def _hold(self, number: int) -> bool:
        """Claim a trial for this process; False if another has it."""
        folder = self.folder / _CLAIMS / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ConfigError):
            self._held[number] = lock.Lock(folder)
        return number in self._held

    def _words(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(f"{key}={one.word(params[key])}" for key, one in self._ranges.items() if key in params)


_STATES = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed", TrialState.RUNNING: "running"}


def _distribution(one: Range) -> BaseDistribution:
    if one.choices:
        return CategoricalDistribution(one.choices)
    if one.whole:
        return IntDistribution(int(one.low), int(one.high), log=one.log)
    return FloatDistribution(one.low, one.high, log=one.log)


class _Seeded(BaseSampler):
    """TPE whose draws for a trial depend on the seed, the trial's number and the trials before: not on the process."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._sampler = TPESampler(seed=seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        mixed = int(np.random.SeedSequence((self._seed, trial.number)).generate_state(1)[0])
        self._sampler = TPESampler(seed=mixed, constant_liar=True)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)
