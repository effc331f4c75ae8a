"""The study of a search: an Optuna study in its storage. No other module uses Optuna.

A trial is a candidate. Its attributes have its scores, or the reason why it has none, so any host can continue the
study. A trial with neither was left by a run that was stopped; it is tried again.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_tool.errors import OutputError, RecipeError, install, reason, shown
from merge_tool.recipe.space import Knob

STUDY = "study.db"
SAMPLERS = ("auto", "tpe", "cmaes", "nsga2", "random")
PRUNERS = ("median", "none")
_NAME = "search"
_STARTUP = 10  # random candidates after the first points, before TPE fits its model
_LOCK_SECONDS = 30  # how long another writer may hold the storage
_PATIENCE = (0.5, 1.0, 2.0, 4.0)  # seconds between attempts to open a new storage
_ALREADY = re.compile("already exists|unique|duplicate", re.IGNORECASE)
_PIECE = 16_000  # characters of one attribute: MySQL has room for 65,535 bytes


@dataclass(frozen=True)
class Objective:
    """A score, and whether less of it is better."""

    name: str
    is_less_better: bool = False

    @property
    def direction(self) -> str:
        return "minimize" if self.is_less_better else "maximize"


def objectives_of(maximize: Sequence[str], minimize: Sequence[str]) -> tuple[Objective, ...]:
    """The scores that count. Raises RecipeError if there is none, or if one is named twice."""
    names = [*maximize, *minimize]
    if not names:
        raise RecipeError("A search needs a score to improve. Give --maximize NAME or --minimize NAME.")
    if len(set(names)) < len(names):
        raise RecipeError("A score is named twice by --maximize and --minimize.")
    return (*(Objective(name) for name in maximize), *(Objective(name, True) for name in minimize))


@dataclass(frozen=True)
class Tried:
    """A finished trial: a value for each knob, and all scores; without scores, the `error`, or that it was pruned.
    `kind` is uniform (then `t` is the value), start, sweep or sampled; `items` are scores of single items."""

    number: int
    values: Mapping[str, Any]
    scores: Mapping[str, float] | None
    error: str = ""
    is_pruned: bool = False
    kind: str = "sampled"
    t: float | None = None
    items: Mapping[str, Sequence[float]] | None = None


class Study:
    """A study with these knobs and objectives. An existing study is continued only if its `facts` are equal.

    Raises RecipeError if Optuna is not installed or cannot do what is asked, OutputError if the storage cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        knobs: Mapping[str, Knob],
        objectives: Sequence[Objective],
        facts: Mapping[str, Any],
        *,
        owner: str,
        storage: str | None,
        sampler: str,
        pruner: str,
        seed: int,
        trials: int,
        num_points: int,
    ) -> None:
        self._optuna = _import_optuna()
        self._knobs, self._objectives, self._owner, self._seed = knobs, objectives, owner, seed
        self._trials, self._num_points, self._is_shared = trials, num_points, storage is not None
        self._sampler, self._where = check_sampler(sampler, pruner, objectives), shown(folder / STUDY)
        if storage is not None:
            self._where = _without_password(storage)
        self._distributions = {name: self._distribution(knob) for name, knob in knobs.items()}
        self._running: Any = None
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        with self._reaching():
            optuna = self._optuna
            self._storage = self._open(storage or f"sqlite:///{(folder / STUDY).absolute()}")
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=f"slerp-merge-{digest}" if self._is_shared else _NAME,
                directions=[objective.direction for objective in objectives],
                pruner=optuna.pruners.MedianPruner() if pruner == "median" else optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
            before = self._study.user_attrs.get("facts")
            if before is None:
                self._study.set_user_attr("facts", json.loads(json.dumps(facts)))
        self.facts: Mapping[str, Any] = before if before is not None else json.loads(json.dumps(facts))

    def close(self) -> None:
        """Let go of the storage."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    # ------------------------------------------------------------------------------------- trials

    def tried(self) -> list[Tried]:
        """The finished trials, in their order."""
        with self._reaching():
            trials = self._study.get_trials(deepcopy=False)
        return [one for one in map(self._tried, trials) if one is not None]

    def enqueue(self, values: Mapping[str, Any], kind: str, t: float | None = None) -> None:
        """Try this point before others are sampled, unless it is queued or has scores already."""
        with self._reaching():
            states = self._optuna.trial.TrialState
            for trial in self._study.get_trials(deepcopy=False):
                known = trial.system_attrs.get("fixed_params", trial.params)
                if known == dict(values) and (trial.state != states.FAIL):
                    return
            self._study.enqueue_trial(dict(values), user_attrs={"kind": kind, "t": t})

    def add(self, values: Mapping[str, Any], scores: Mapping[str, float], kind: str, t: float | None) -> None:
        """Add a point whose scores are known."""
        with self._reaching():
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    values=[scores[objective.name] for objective in self._objectives],
                    params=dict(values),
                    distributions=self._distributions,
                    user_attrs={"kind": kind, "t": t, "scores": dict(scores)},
                )
            )

    def recover(self) -> int:
        """Queue the trials again that a stopped run of this OUT left unfinished. Returns their number."""
        with self._reaching():
            states, stale = self._optuna.trial.TrialState, []
            for trial in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
                if not self._is_shared or trial.user_attrs.get("owner") == self._owner:
                    stale.append(trial)
            for trial in stale:
                if "scores" in trial.user_attrs:  # stopped while its scores were recorded
                    scores = trial.user_attrs["scores"]
                    self._study.tell(trial.number, [scores[objective.name] for objective in self._objectives])
                    continue
                self._study.tell(trial.number, state=states.PRUNED if "pruned" in trial.user_attrs else states.FAIL)
                if trial.params.keys() == self._knobs.keys() and not {"pruned", "error"} & trial.user_attrs.keys():
                    attrs = {key: trial.user_attrs[key] for key in ("kind", "t") if key in trial.user_attrs}
                    self._study.enqueue_trial(trial.params, user_attrs=attrs)
            return len(stale)

    def ask(self) -> tuple[int, dict[str, Any]]:
        """The next candidate: the number of its trial, and a value for each knob."""
        with self._reaching():
            self._study.sampler = self._make_sampler(len(self.tried()))
            self._running = self._study.ask(self._distributions)
            self._running.set_user_attr("owner", self._owner)
            return self._running.number, dict(self._running.params)

    def is_hopeless(self, step: int, scores: Mapping[str, float]) -> bool:
        """Record intermediate scores. Returns whether the candidate is worse than others were at that step; always
        False if there are several objectives."""
        if len(self._objectives) > 1 or self._objectives[0].name not in scores:
            return False
        with self._reaching():
            self._running.report(scores[self._objectives[0].name], step)
            return bool(self._running.should_prune())

    def tell(self, scores: Mapping[str, float], items: Mapping[str, Sequence[float]]) -> None:
        with self._reaching():
            for name, values in items.items():
                text = json.dumps([float(value) for value in values])
                for start in range(0, len(text), _PIECE):
                    self._running.set_user_attr(f"items:{start // _PIECE:06d}:{name}", text[start : start + _PIECE])
            self._running.set_user_attr("scores", dict(scores))
            self._study.tell(self._running, [scores[objective.name] for objective in self._objectives])

    def tell_pruned(self) -> None:
        with self._reaching():
            self._running.set_user_attr("pruned", True)
            self._study.tell(self._running, state=self._optuna.trial.TrialState.PRUNED)

    def tell_failed(self, error: str) -> None:
        with self._reaching():
            self._running.set_user_attr("error", error[:_PIECE])
            self._study.tell(self._running, state=self._optuna.trial.TrialState.FAIL)

    def _tried(self, trial: Any) -> Tried | None:
        attrs = trial.user_attrs
        if not trial.state.is_finished() or not {"scores", "error", "pruned"} & attrs.keys():
            return None
        pieces: dict[str, str] = {}
        for key in sorted(key for key in attrs if key.startswith("items:")):
            name = key.split(":", 2)[2]
            pieces[name] = pieces.get(name, "") + attrs[key]
        is_complete = trial.state == self._optuna.trial.TrialState.COMPLETE
        return Tried(
            number=trial.number,
            values=dict(trial.params),
            scores=attrs["scores"] if is_complete else None,
            error=attrs.get("error", ""),
            is_pruned="pruned" in attrs,
            kind=attrs.get("kind", "sampled"),
            t=attrs.get("t"),
            items={name: json.loads(text) for name, text in pieces.items()} if is_complete else None,
        )

    # ------------------------------------------------------------------------------------ Optuna's

    def _distribution(self, knob: Knob) -> Any:
        distributions = self._optuna.distributions
        if knob.choices:
            return distributions.CategoricalDistribution(knob.choices)
        return distributions.FloatDistribution(knob.low, knob.high, log=knob.log)

    def _make_sampler(self, num_tried: int) -> Any:
        """The sampler for the next candidate. Its random numbers depend on the seed and on the number of candidates
        tried, so a search that was stopped continues as if it had not been. Hosts of one study have other numbers."""
        samplers, words = self._optuna.samplers, [self._seed, num_tried, self._owner if self._is_shared else ""]
        seed = int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:4], "big")
        if self._sampler == "tpe":
            with warnings.catch_warnings():  # that `multivariate` is experimental
                warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
                return samplers.TPESampler(seed=seed, n_startup_trials=self._num_points + _STARTUP, multivariate=True)
        if self._sampler == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=min(50, max(8, self._trials // 6)))
        if self._sampler == "cmaes":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return samplers.RandomSampler(seed=seed)

    def _open(self, url: str) -> Any:
        waits = {"connect_args": {"timeout": _LOCK_SECONDS}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        for delay in _PATIENCE:
            try:
                return self._optuna.storages.RDBStorage(url, engine_kwargs=waits)
            except Exception as e:  # of two hosts that make the tables at once, one fails
                if not _ALREADY.search(str(e)):
                    raise
                time.sleep(delay)
        return self._optuna.storages.RDBStorage(url, engine_kwargs=waits)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn the storage's errors into one message."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (self._optuna.exceptions.StorageInternalError, SQLAlchemyError) as e:
            words = str(e.__cause__ or e).splitlines()[0]
            if "locked" in str(e) or "locked" in words:
                raise OutputError(
                    f"{self._where}: the storage is locked by another program. Close that program (a dashboard, a "
                    "database browser, a copy), then run the same command: it continues."
                ) from e
            raise OutputError(
                f"{self._where}: the storage cannot be used ({shown(words)}). Correct that, then run the same command: "
                "it continues."
            ) from e
        except ImportError as e:
            raise RecipeError(
                f"--storage {self._where}: a package for this database is missing ({reason(e.__cause__ or e)}). "
                "Install it; for postgresql+psycopg2://... that is psycopg2-binary, for mysql+pymysql://... PyMySQL."
            ) from e
        except (ValueError, RuntimeError) as e:
            if "storage" not in str(e).lower() and "study" not in str(e).lower():
                raise
            raise OutputError(f"{self._where}: the storage cannot be used ({reason(e)}).") from e


def check_sampler(sampler: str, pruner: str, objectives: Sequence[Objective]) -> str:
    """The sampler's name, `auto` resolved. Raises RecipeError if it is unknown or not installed."""
    for name, known in ((sampler, SAMPLERS), (pruner, PRUNERS)):
        if name not in known:
            raise RecipeError(f"'{shown(name)}' is not one of {', '.join(known)}.")
    _import_optuna()
    if sampler == "auto":
        return "tpe" if len(objectives) == 1 else "nsga2"
    if sampler == "cmaes":
        if len(objectives) > 1:
            raise RecipeError("--sampler cmaes is for one objective, and there are several: take nsga2 or tpe.")
        try:
            import cmaes  # noqa: F401
        except ImportError as e:
            raise RecipeError(f"--sampler cmaes needs the package cmaes: {install('search')}.") from e
    return sampler


def _without_password(url: str) -> str:
    """A storage's address as it may be printed."""
    scheme, mark, rest = url.partition("://")
    name, at, host = rest.rpartition("@")
    return shown(f"{scheme}{mark}{name.partition(':')[0]}{at}{host}" if at else url)


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as e:
        raise RecipeError(f"A search needs Optuna: {install('search')}.") from e
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
