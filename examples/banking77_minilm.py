"""Half of MiniLM's layers, in eight bits, on Banking77: measured, verified in two runtimes, certified.

The network (see `banking77_model`) is fine-tuned once and kept. Then three of its six layers are removed, the rest is
distilled from the whole, and linear layers are quantised. The result is lowered to ONNX Runtime and OpenVINO, measured
beside the network as it was and the runtime's own one-line int8, written as an artifact, verified in a clean process,
and certified on the 3,080 test queries, which nothing else has seen. A linear model on TF-IDF features is the floor
that any of this has to beat.

    TRIMPOINT_DATA=data python examples/banking77_minilm.py            # about half an hour on two cores
    python examples/banking77_minilm.py --fast                         # random weights, no data: to see that it runs

A run that was cut off goes on where it was. Figures: `runs/banking77/figures.json`.
"""

import argparse
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from banking77_model import Rows, made_up, make_task, model, package, read_banking77, tiny
from torch import nn

import trimpoint as tpt
from trimpoint.artifact import verify_artifact, write_artifact
from trimpoint.measure.environment import environment, instruction_set
from trimpoint.measure.inputs import synthetic_like
from trimpoint.methods.distill import Distill
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.report.text import profile_table
from trimpoint.search.delivery import files_of
from trimpoint.search.fingerprint import model_digest
from trimpoint.search.workbench import Workbench
from trimpoint.task import Task
from trimpoint.trust.certify import certify_runs
from trimpoint.trust.ledger import Ledger
from trimpoint.values import Certificate, Trial, to_data

MARGIN = 0.015
RUNTIMES = ("onnxruntime", "openvino")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run: everything, or little of it.

    Args:
        network: to be compressed.
        task: its data.
        plan: what is done to it.
        train: what the floor is trained on.
        test: what it is scored on.
        ledger: of the looks at the test queries.
    """

    network: nn.Module
    task: Task
    plan: tpt.Plan
    train: Rows
    test: Rows
    ledger: Ledger


def recipe(epochs: float) -> tpt.Plan:
    """Return the plan: three of six layers, learning from the whole network, eight bits."""
    distill = Distill(epochs=epochs, lr=2e-4, temperature=2.0, precision="bfloat16")
    return tpt.Plan().then(DropBlocks(ratio=0.5), distill, QuantizeStatic())


def whole() -> Setting:
    """Return the real thing."""
    train, test = read_banking77("train"), read_banking77("test")
    return Setting(
        network=model(), task=make_task(train, test), plan=recipe(3.0), train=train, test=test, ledger=Ledger()
    )


def fast(out: Path) -> Setting:
    """Return a small network with random weights and queries that were made up."""
    train, test = made_up(120), made_up(60)
    task = make_task(train, test, select=30, calibrate=30)
    ledger = Ledger(out / "ledger.jsonl")
    return Setting(network=tiny(), task=task, plan=recipe(1.0), train=train, test=test, ledger=ledger)


def floor(train: Rows, test: Rows) -> float:
    """Return the accuracy on `test` of a logistic regression on TF-IDF features of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    linear = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=30, max_iter=300)
    )
    linear.fit([text for text, _ in train], [intent for _, intent in train])
    return float(linear.score([text for text, _ in test], [intent for _, intent in test]))


def trial(number: int, plan: tpt.Plan, label: str, role: Any = "candidate") -> Trial:
    """Return a trial that has not been run."""
    return Trial(
        number=number, plan=plan.to_data(), plan_hash=plan.hash, rung=0, state="complete", role=role, label=label
    )


def compare(setting: Setting, target: tpt.Target, out: Path) -> dict[str, Trial]:
    """Make and measure on one runtime: the network, its one-line int8, the plan without and with its last step.

    Training is shared by all runtimes: its result lies in `out/study`.
    """
    key = hashlib.sha256((model_digest(setting.network) + setting.task.fingerprint("train")).encode()).hexdigest()
    study = out / "study"
    study.mkdir(parents=True, exist_ok=True)
    bench = Workbench(setting.network, setting.task, target, study, key)
    base = bench.baseline(trial(0, tpt.Plan(), "original", "baseline"))
    bench.use_baseline(base)
    floating = setting.plan.prefix(len(setting.plan.steps) - 1)
    return {
        "original": base,
        "one-line int8": bench.one_line_int8(trial(1, tpt.Plan(), "one-line int8", "one_line_int8")),
        "3 layers, distilled": bench.candidate(trial(2, floating, "3 layers, distilled"), floating, 1.0),
        "3 layers, distilled, int8": bench.candidate(
            trial(3, setting.plan, "3 layers, distilled, int8"), setting.plan, 1.0
        ),
    }


def deliver(setting: Setting, target: tpt.Target, trials: dict[str, Trial], out: Path) -> Certificate:
    """Certify the last trial against the original in the same runtime, and write and verify its artifact."""
    reference, chosen = trials["original"], list(trials.values())[-1]
    bench = Workbench(setting.network, setting.task, target, out / "study", "deliver")
    files, before = files_of(out / "study", chosen), files_of(out / "study", reference)
    session = bench.open(files)
    certificate = certify_runs(
        bench.open(before),
        session,
        setting.task,
        MARGIN,
        ledger=setting.ledger,
        artifact_digest=files.digest,
        finalists=len(RUNTIMES),
        batch=f"banking77-minilm/{setting.plan.hash}",
        runtime=f"{bench.runtime.name} {bench.runtime.version()}",
        instruction_set=instruction_set(),
    )
    certificate = replace(certificate, reference="original in the same runtime")
    inputs = [synthetic_like(batch, seed) for seed, batch in enumerate(bench.inputs.shapes.values())]
    directory = out / f"artifact-{target.runtime}"
    digest = write_artifact(
        directory,
        source_dir=files.directory,
        lowered=files.lowered,
        parity=[(batch, session(batch)) for batch in inputs],
        plan=setting.plan.to_data(),
        profile=chosen.profile,
        baseline=reference.profile,
        certificate=certificate,
        extra={"tokenizer.json": package() / "tokenizer.json"},
    )
    checked = verify_artifact(directory, digest)
    print(f"{directory}: {checked.files} files verified, {checked.cases} cases in {checked.runtime}")
    return certificate


def row(name: str, target: tpt.Target, measured: Trial, certificate: Certificate | None) -> dict[str, Any]:
    """Return the figures of a trial."""
    figures = {
        key: {name: value for name, value in to_data(m).items() if name in ("value", "low", "high", "unit")}
        for key, m in measured.profile.items()
    }
    quality = measured.quality
    return {
        "system": name,
        "runtime": target.runtime,
        "threads": target.threads,
        "select": None if quality is None else to_data(quality),
        "profile": figures,
        "certificate": None if certificate is None else to_data(certificate),
    }


def run(setting: Setting, out: Path, threads: int, runtimes: Sequence[str] = RUNTIMES) -> dict[str, Any]:
    """Do all of it and return the figures."""
    for warning in setting.task.check():
        print(f"warning: {warning}")
    rows: list[dict[str, Any]] = []
    for runtime in runtimes:
        target = tpt.Target(runtime=runtime, threads=threads)
        measured = tpt.measure(setting.network, setting.task, target)
        print(profile_table(measured.profile, title=f"original in {runtime}").plain())
        trials = compare(setting, target, out)
        certificate = deliver(setting, target, trials, out)
        for name, found in trials.items():
            last = found is list(trials.values())[-1]
            rows.append(row(name, target, found, certificate if last else None))
            print(line(rows[-1]))
    changes = [to_data(change) for change in found.changes]
    return {
        "plan": str(setting.plan),
        "environment": environment(),
        "samples": {role: len(setting.task.data(role)) for role in ("train", "calibrate", "select", "certify")},
        "floor": {"system": "TF-IDF + logistic regression", "accuracy": floor(setting.train, setting.test)},
        "rows": rows,
        "changes": changes,
    }


def line(figures: dict[str, Any]) -> str:
    """Return the figures of a row in one line."""
    profile, quality, certificate = figures["profile"], figures["select"], figures["certificate"]
    text = f"{figures['runtime']}, {figures['system']}: accuracy {quality['value']:.4f} on `select`"
    text += f", {profile['file_bytes']['value'] / 1e6:.1f} MB, {profile['latency_ms']['value']:.2f} ms"
    ratios = [f"{m['value']:.2f}×" for name, m in profile.items() if name.startswith("latency_ratio")]
    text += f", latency ratios {' '.join(ratios)}"
    if certificate is not None:
        text += (
            f"; certificate {certificate['status']}: {certificate['baseline']:.4f} → {certificate['value']:.4f}, drop "
            f"at most {certificate['upper']:.4f} (margin {certificate['margin']}, n {certificate['n']})"
        )
    return text


def main(arguments: list[str] | None = None) -> int:
    """Run the example and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a small network with random weights and a few queries")
    parser.add_argument("--out", type=Path, default=Path("runs/banking77"))
    parser.add_argument("--threads", type=int, default=1, help="of the runtimes")
    parser.add_argument("--runtimes", nargs="+", default=RUNTIMES, choices=RUNTIMES)
    options = parser.parse_args(arguments)
    setting = fast(options.out) if options.fast else whole()
    figures = run(setting, options.out, options.threads, options.runtimes)
    (options.out / "figures.json").write_text(
        json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(f"floor: {figures['floor']['system']}, accuracy {figures['floor']['accuracy']:.4f}")
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="sklearn")
    raise SystemExit(main())
