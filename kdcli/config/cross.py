"""What one section of a config asks of another: signals, batch arithmetic, devices, paths, tokenizers, domains."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcli.config import augmented, demands, domains, scheduled, tasks, teachers
from kdcli.config.build import build, build_schedules
from kdcli.config.environment import expand
from kdcli.config.nearest import suggest
from kdcli.config.schema import COMPONENTS, TERMS
from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.text.signals import open_store
from kdcli.text.vocabulary import share_ids


def problems_in(config: Mapping[str, Any]) -> list[str]:
    """One sentence per contradiction. Every section must be sound by itself (`check` sees to that)."""
    if config["verb"] == "augment":
        return augmented.checked(config)
    found = [
        *_batch(config),
        *_packing(config),
        *_devices(config),
        *_model_paths(config),
        *_resume(config),
        *_terms(config),
    ]
    objects, refused = built(config)
    found += refused
    if refused:
        return found
    if augmented.given(config):  # the rows are still to be made, and are looked at when there are any
        found += augmented.seeds_problems(objects.pop("data"))
    if unfit := tasks.problems_in(config, objects):
        return found + unfit
    found += _needs(config, objects) + _temperatures(config, objects)
    found += augmented.problems_in(config, objects)
    found += _student(config) + _domains(objects) + domains.problems_in(config, objects)
    found = found or _demands(config, objects)
    found = found or teachers.problems_in(objects, lambda: _brought(objects))
    found = found or _hub_models(config, objects) or _tokenizers(config, objects) or _fit(objects) or _settled(objects)
    return found or _stored(config, objects)


def _batch(config: Mapping[str, Any]) -> list[str]:
    batch = config["batch"]
    if "size" not in batch:
        return []
    size, micro, processes = batch["size"], batch["micro_size"], _processes(config)
    unit = micro * processes
    if size % unit == 0:
        return []
    up = (size // unit + 1) * unit
    fitting = max(m for m in range(1, micro + 1) if size % (m * processes) == 0) if size % processes == 0 else None
    other = f", or batch.micro_size={fitting}" if fitting else ""
    return [
        f"batch.size: {size} is not divisible by batch.micro_size x processes = {micro} x {processes} = {unit}; "
        f"set batch.size={up}{other}"
    ]


def _packing(config: Mapping[str, Any]) -> list[str]:
    """transformers keeps packed examples apart under flash attention only where a forward has one row."""
    batch = config["batch"]
    if not batch.get("packing") or batch["micro_size"] == 1:
        return []
    return [
        f"{section}.attention: {config[section]['attention']} lets packed examples of a batch see each other; set "
        f"{section}.attention=sdpa, batch.micro_size=1, or batch.packing=false"
        for section in ("teacher", "student")
        if "flash" in str((config.get(section) or {}).get("attention"))
    ]


def _devices(config: Mapping[str, Any]) -> list[str]:
    import torch

    processes = config["launch"].get("processes", 1)
    if not torch.cuda.is_available() or processes <= torch.cuda.device_count():
        return []
    return [
        f"launch.processes: {processes} processes, but this machine has {torch.cuda.device_count()} GPU(s), and each "
        f"process needs its own; set launch.processes={torch.cuda.device_count()}"
    ]


def _processes(config: Mapping[str, Any]) -> int:
    return config["launch"].get("processes", 1) * (config["launch"].get("nodes") or 1)


def _model_paths(config: Mapping[str, Any]) -> list[str]:
    problems = []
    for section in ("teacher", "student"):
        for key in ("path", "tokenizer"):
            value = (config.get(section) or {}).get(key)
            if isinstance(value, str):
                problems += _path_problem(value, f"{section}.{key}")
    nested = teachers.paths_in(config.get("teacher"))
    return problems + [problem for where, value in nested for problem in _path_problem(value, where)]


def _path_problem(value: str, where: str) -> list[str]:
    """A path that names nothing; `owner/name` may be a hub id, which only the hub can refuse."""
    try:
        path = paths.resolve(expand(value))
    except ConfigError as error:
        return [f"{where}: {error}"]
    if path.exists() or re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", value):
        return []
    return [f"{where}: there is no file or folder {path} (seen from {Path.cwd()})"]


def _resume(config: Mapping[str, Any]) -> list[str]:
    resume = config["run"].get("resume", "auto")
    if resume in ("auto", "never"):
        return []
    path = Path(resume).expanduser()
    if not path.is_dir():
        close = suggest(resume, ["auto", "never"])
        hint = close if close.startswith("did") else "give auto, never, or the folder of a checkpoint or run"
        return [f"run.resume: there is no folder {path}; {hint}"]
    if not (path / "COMMIT.json").is_file() and not (path / "checkpoints").is_dir():
        return [
            f"run.resume: {path} is neither a checkpoint (it has no COMMIT.json) nor a run folder with checkpoints; "
            "give RUN_DIR/checkpoints/step-N"
        ]
    return []


def _terms(config: Mapping[str, Any]) -> list[str]:
    if config["verb"] == "evaluate":
        missing = not config.get("evaluation")
        return (
            ["evaluation: there is nothing to evaluate; add +evaluation@evaluation.heldout=heldout"] if missing else []
        )
    if config["verb"] == "cache":
        return []
    if any(term is not None for term in (config.get("objective") or {}).values()):
        return []
    return ["objective: there is nothing to learn from; add objective@objective.kd=forward_kl"]


def built(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Every component that is cheap to construct, by its place in the config; and what the constructors refuse."""
    import kdcli.api as api

    objects: dict[str, Any] = {}
    problems: list[str] = []
    for section, interface in COMPONENTS.items():
        node = config.get(section)
        nodes = (
            {f"{section}.{name}": term for name, term in (node or {}).items()} if section in TERMS else {section: node}
        )
        for where, one in nodes.items():
            found = scheduled.refusals(one, where) if section == "objective" and one is not None else []
            problems += found
            if one is not None and not found:
                objects[where] = _caught(lambda one=one, i=interface: build(one, getattr(api, i)), where, problems)
    return objects, problems


def _caught(action: Callable[[], Any], where: str, problems: list[str]) -> Any:
    """What `action` returns; a ConfigError becomes problems that begin with the place."""
    try:
        return action()
    except ConfigError as error:
        head, dot, _ = where.partition(".")
        if dot and head in ("augmentation", "writer"):  # components there know their class, and not their name
            told = [re.sub(rf"^{head}(?:: ?\w+)?\.(?=\w)", f"{where}.", problem) for problem in error.problems]
            problems += [p if p.startswith(where) else f"{where}: {p}" for p in told]
            return None
        problems += [
            p if p.startswith((f"{head}.", f"{head}:", f"{head}=")) else f"{where}: {p}" for p in error.problems
        ]
        return None


def _needs(config: Mapping[str, Any], objects: Mapping[str, Any]) -> list[str]:
    from kdcli.api import Need

    teacher = objects["teacher"]
    given = teacher.provides | Need.REFERENCE  # the Distiller's: the student as it began
    problems = []
    for where, objective in _objectives(objects).items():
        lacking = objective.needs & ~given
        if lacking:
            words = " and ".join(str(flag.name).lower() for flag in lacking)
            problems.append(
                f"{where}: {type(objective).__name__} needs the teacher's {words}, which "
                f"{type(teacher).__name__} does not provide; {_way_out(lacking, 'teacher', teacher)}, or drop it with "
                f"~objective@{where}"
            )
    return problems


def _temperatures(config: Mapping[str, Any], objects: Mapping[str, Any]) -> list[str]:
    """Objectives are at the temperature of a teacher without logits: its top k does not tell those of another one."""
    from kdcli.api import Need

    teacher = objects["teacher"]
    given = getattr(teacher, "temperature", None)
    if given is None or Need.LOGITS in teacher.provides:
        return []
    schedules = build_schedules(config.get("objective") or {})
    problems = []
    for where, objective in _objectives(objects).items():
        schedule = schedules.get((where.partition(".")[2], "temperature"))
        own = schedule.extremes if schedule is not None else (getattr(objective, "temperature", given),)
        unlike = [value for value in own if value != given]
        if Need.DISTRIBUTION in objective.needs and unlike:
            problems.append(
                f"{where}.temperature: {unlike[0]:g}, but {type(teacher).__name__} gives the likeliest tokens at "
                f"temperature {given:g}, which do not tell those of another; set {where}.temperature={given:g}, or "
                "teacher=hf"
            )
    return problems


def _way_out(lacking: Any, section: str, model: Any) -> str:
    """What to set so that a model provides what an objective needs."""
    from kdcli.api import Need

    if Need.ATTENTION in lacking and hasattr(model, "attention"):
        return "set teacher.attention=eager and student.attention=eager"
    if Need.REWARD in lacking:
        without = demands.alternatives(lambda objective: Need.REWARD not in objective.needs)
        return f"choose an objective that does without, such as {demands.named(without)}"
    return f"set {section}=hf"


def _objectives(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The terms by their place."""
    return {where: item for where, item in objects.items() if where.startswith("objective.")}


def _demands(config: Mapping[str, Any], objects: Mapping[str, Any]) -> list[str]:
    """What objectives ask of the batch and of the rows of the data."""
    from kdcli.api import Need

    terms, data = _objectives(objects), objects.get("data")
    problems = demands.of_batch(config, terms)
    if data is not None:
        source, given = str(config["data"].get("path", "data.domains")), objects["teacher"].provides | Need.REFERENCE
        problems += _caught(lambda: demands.of_data(data, terms, source, given), "data", problems) or []
    return problems


def _fit(objects: Mapping[str, Any]) -> list[str]:
    """The student shows the layers that objectives compare, and both models have them, as their shapes say."""
    from kdcli.api import Need, Objective, StudentInit

    layers = Need.HIDDEN | Need.ATTENTION | Need.RELATIONS
    student, teacher = objects["student"], objects["teacher"]
    terms = _objectives(objects)
    problems = []
    for where, objective in terms.items():
        lacking = objective.needs & layers & ~student.provides
        if lacking:
            words = " and ".join(str(flag.name).lower() for flag in lacking)
            problems.append(
                f"{where}: {type(objective).__name__} needs the student's {words}, which {type(student).__name__} does "
                f"not show; {_way_out(lacking, 'student', student)}, or drop it with ~objective@{where}"
            )
    fitted = {where: item for where, item in terms.items() if type(item).fit is not Objective.fit}
    init = objects.get("student_init")
    if problems or init is None or not (fitted or type(init).shape is not StudentInit.shape):
        return problems
    own = _caught(lambda: init.shape(student, teacher), "student_init", problems)
    shapes = own, own if getattr(teacher, "is_student", False) else _caught(teacher.shape, "teacher", problems)
    if own is not None and not problems:
        for where, objective in fitted.items():
            _caught(lambda objective=objective: objective.fit(*shapes), where, problems)
    return problems


def _student(config: Mapping[str, Any]) -> list[str]:
    init = (config.get("student_init") or {}).get("_target_", "")
    if config["verb"] == "evaluate" and config["student"].get("path") is None:
        return ["student.path: which model or run should be evaluated? add student.path=…"]
    if init.endswith(".Pretrained") and config["student"].get("path") is None:
        return [
            "student.path: student_init=pretrained starts from a model; add student.path=…, or choose "
            "student_init=keep_layers (cut from the teacher) or student_init=from_config (random weights)"
        ]
    if config["student"].get("quantization"):
        if not init.endswith(".Pretrained"):
            return [
                "student.quantization: only a model as it was loaded is held in 4 bits; set student_init=pretrained"
            ]
        if config["engine"].get("stage") == 3:
            return [
                "student.quantization: stage 3 cannot split a model in 4 bits; set engine=zero2, or quantization=null"
            ]
    return []


def _domains(objects: Mapping[str, Any]) -> list[str]:
    """The data can be found, and the domains that others name are among them."""
    problems: list[str] = []
    for where, item in objects.items():
        for name, value in vars(item).items():
            if where.startswith("evaluation.") and hasattr(value, "domains") and hasattr(value, "fingerprint"):
                _caught(value.domains, f"{where}.{name}", problems)
    data = objects.get("data")
    known = _caught(data.domains, "data", problems) if data else None
    if known is None:
        return problems
    for where, item in objects.items():
        if where.startswith("objective."):
            problems += [
                f"{where}.domains: the data have no domain {name}; {suggest(name, known)}"
                for name in item.domains
                if name not in known
            ]
    if (scheduler := objects.get("domain_scheduler")) is not None:
        _caught(lambda: scheduler.initial(dict.fromkeys(known, 1)), "domain_scheduler", problems)
    return problems


def _hub_models(config: Mapping[str, Any], objects: Mapping[str, Any]) -> list[str]:
    """A model that is not on this disk must be on the hub: its tokenizer is asked for, which is small."""
    problems: list[str] = []
    for section in ("teacher", "student"):
        path = (config.get(section) or {}).get("path")
        if isinstance(path, str) and "://" not in path and not Path(expand(path)).expanduser().exists():
            _caught(objects[section].load_tokenizer, section, problems)
    return problems


def _tokenizers(config: Mapping[str, Any], objects: Mapping[str, Any]) -> list[str]:
    """Teacher and student give every token the same id, or only objectives for different tokenizers compare them;
    padded rows of an embedding are not tokens. Labels are compared whatever the tokenizers."""
    from kdcli.api import StudentInit

    if objects["student"].task.kind == "classification":
        return []
    teacher, student = config.get("teacher") or {}, config["student"]
    named = student.get("tokenizer") or student.get("path")
    init = objects.get("student_init")
    brings = init is not None and type(init).load_tokenizer is not StudentInit.load_tokenizer
    source = teacher.get("path") or teacher.get("tokenizer")  # a served model's tokenizer lies where the user has it
    source = source or ("" if hasattr(objects["teacher"], "parts") else None)  # it is made of several
    if source is None or (not brings and (named is None or named == source)):
        return []  # one tokenizer serves both
    problems: list[str] = []
    a = _caught(objects["teacher"].load_tokenizer, "teacher", problems)
    if brings:
        b = _caught(lambda: _brought(objects), "student_init", problems)
    else:
        b = _caught(objects["student"].load_tokenizer, "student", problems)
    if a is None or b is None:
        return problems
    terms = _objectives(objects)
    unequal = tokenizer_problems(a.get_vocab(), b.get_vocab(), demands.of_tokenizers(terms))
    if unequal and config["verb"] == "evaluate":
        return [f"{unequal[0]}; to evaluate the student alone set teacher=none"]
    if unequal and config["verb"] == "cache":
        return [f"{unequal[0]}; a cache holds what a teacher says of the student's own tokens"]
    if unequal and demands.of_tokenizers(terms):
        return unequal
    for where, objective in terms.items():
        _caught(lambda objective=objective: objective.match(b, a), where, problems)
    return problems


def _settled(objects: Mapping[str, Any]) -> list[str]:
    """New tokens, adapters and frozen weights of the student fit the tokenizer and the model that it will have."""
    init, student, teacher = (objects.get(name) for name in ("student_init", "student", "teacher"))
    problems: list[str] = []
    if init is not None and student is not None:
        architecture = lambda: init.architecture(student, teacher)  # noqa: E731
        _caught(lambda: student.check(architecture, lambda: _brought(objects)), "student", problems)
    return problems


def _stored(config: Mapping[str, Any], objects: Mapping[str, Any]) -> list[str]:
    """A store of a teacher's signal is of this teacher, these tokens, and what the objectives can use."""
    problems: list[str] = []
    teacher = objects["teacher"]
    if config["verb"] == "cache":
        tokenizer = _caught(lambda: objects["student"].prepared(_brought(objects)), "student", problems)
        if tokenizer is not None:
            _caught(lambda: open_store(config["cache"], teacher, tokenizer), "cache", problems)
    elif hasattr(teacher, "problems_with"):  # kdcli.teacher.cached
        tokenizer = _caught(lambda: objects["student"].prepared(_brought(objects)), "student", problems)
        problems += teacher.problems_with(tokenizer, _objectives(objects).items())
    return problems


def _brought(objects: Mapping[str, Any]) -> Any:
    """The tokenizer that the student will have once student_init has made it."""
    if "student_init" not in objects:
        return objects["student"].load_tokenizer() or objects["teacher"].load_tokenizer()
    return objects["student_init"].load_tokenizer(objects["student"], objects["teacher"])


def tokenizer_problems(
    teacher: Mapping[str, int], student: Mapping[str, int], comparing: Sequence[str] = ()
) -> list[str]:
    """What is wrong where two maps from token to id do not agree. `comparing`: which terms need that they do."""
    if share_ids(teacher, student):
        return []
    small, large = sorted((teacher, student), key=len)
    other = sum(large.get(token) != index for token, index in small.items())
    terms = f", but {', '.join(comparing)} compares them id by id" if comparing else ""
    return [
        f"student: its tokenizer is not the teacher's: {other:,} of {len(small):,} tokens have another id (the teacher "
        f"has {len(teacher):,} tokens, the student {len(student):,}){terms}; choose a student with the teacher's "
        "tokenizer (or student_init=keep_layers), or a cross-tokenizer objective: "
        f"objective={demands.cross_tokenizer_names()}"
    ]
