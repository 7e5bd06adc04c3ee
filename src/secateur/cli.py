"""The command ``secateur``: parse, call one study, print."""

from __future__ import annotations

import contextlib
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from secateur.errors import SecateurError, SettingError

EXIT_BAD_INPUT = 2
EXIT_NOT_VERIFIED = 3
EXIT_NOTHING_PASSED = 4
EXIT_INTERRUPTED = 130

app = typer.Typer(
    help="Find the attention heads and MLP neurons that carry a social bias, remove the few that matter, prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
suites_app = typer.Typer(help="List the built-in suites, or show one.", invoke_without_command=True)
app.add_typer(suites_app, name="suites")
console = Console()
errors = Console(stderr=True)

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Hub id, directory or .gguf file [default: SmolLM2-135M-Instruct].")
]
PlansModel = Annotated[
    str | None, typer.Option("--model", "-m", help="Hub id, directory or .gguf file [default: the plan's].")
]
SuiteName = Annotated[str, typer.Option("--suite", "-s", help="A built-in suite's name, or the path of a YAML file.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Precision = Annotated[
    str,
    typer.Option(
        help="Of products of fp32 matrices: highest; high or medium (faster with TF32 or AMX); or auto: tries medium, "
        "and takes it where it is at least 1.3 times as fast and changes next to nothing."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps [default: cuda where there is one].")]
DeviceMap = Annotated[str | None, typer.Option(help="Spread a large model over devices: auto, balanced, ...")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
Seed = Annotated[int, typer.Option(min=0, help="Of splits, random masks and intervals.")]
BatchSize = Annotated[int, typer.Option(help="Prompts in one forward pass.")]
Chat = Annotated[str, typer.Option(help="auto, chat (insist on the template) or plain.")]
MethodName = Annotated[str, typer.Option("--method", help="How units are scored and chosen; see secateur methods.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method; may be repeated.")
]
Limit = Annotated[float, typer.Option("--max-perplexity-increase", help="The utility limit; 0.02 stands for 2 %.")]
Ablation = Annotated[str, typer.Option(help="What a removed unit gives: zero, or its mean.")]
UtilityText = Annotated[Path | None, typer.Option(help="Neutral text instead of the built-in corpus.")]
UtilityTokens = Annotated[int, typer.Option(help="Tokens of it in each of fit, select and test; 0 for all.")]
MaxMarkers = Annotated[int, typer.Option(help="Markers per group in fit and select; 0 for all.")]
ControlSuite = Annotated[str, typer.Option(help="Non-demographic suite to compare with; 'none' for none.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Spread masks that are known together over Ray actors (docs/scaling.md says which): auto (this machine), "
        "local:N or a cluster's address.",
    ),
]
MasksAtOnce = Annotated[
    int, typer.Option(help="Masks in one forward pass, each with its own rows; more keep a GPU busier.")
]
KeptMib = Annotated[
    int, typer.Option(help="MiB of hidden states that a search keeps, to begin a mask where it differs; 0 for none.")
]
Temperature = Annotated[float, typer.Option(help="Of sampled answers.")]
ClassifierName = Annotated[
    str,
    typer.Option(
        "--classifier",
        help="Judges what the model writes: a text classifier's Hub id or directory, profanity (offline, extra "
        "toxicity), none, or auto (profanity where it is installed).",
    ),
]
BadLabels = Annotated[
    list[str] | None,
    typer.Option(
        "--bad-label",
        help="A label of the classifier that counts as bad; may be repeated [default: by their names].",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output directory if it exists.")]


def _print_version(asked: bool) -> None:
    if asked:
        import secateur

        console.print(f"secateur {secateur.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def audit(
    model: Model = None,
    suite: SuiteName = "occupations",
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for audit.json and report.html.")] = Path(
        "runs/audit"
    ),
    dtype: Dtype = "auto",
    matmul_precision: Precision = "highest",
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    chat: Chat = "auto",
    sampled_runs: Annotated[
        int, typer.Option(min=0, help="Also sample so many answers to every quantity prompt, and compare; 0 for none.")
    ] = 0,
    temperature: Annotated[float, typer.Option(help="Of the sampled answers.")] = 1.0,
    overwrite: Overwrite = False,
) -> None:
    """Measure how differently a model treats the groups of a suite."""
    import secateur
    from secateur.measures.sampling import check_sampling
    from secateur.reports.terminal import TerminalProgress, audit_summary, audit_table

    asked, mode = _suite(suite), _chat(chat)
    if sampled_runs:
        check_sampling(asked, sampled_runs, temperature)
    _check_output(output, overwrite)
    loaded = _load(model, dtype, device, device_map, trust_remote_code, matmul_precision)
    result = secateur.audit(
        loaded,
        asked,
        seed=seed,
        batch_size=batch_size,
        chat=mode,
        sampled_runs=sampled_runs,
        temperature=temperature,
        output=output,
        overwrite=overwrite,
        progress=TerminalProgress(console),
    )
    console.print(audit_table(result))
    for line in audit_summary(result):
        console.print(escape(line))
    console.print(f"Written: {escape(str(output))}/audit.json, report.html")


@app.command()
def repair(
    model: Model = None,
    suite: SuiteName = "occupations",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for the plan, report and checkpoint.")
    ] = Path("runs/repair"),
    method: MethodName = "attribution",
    settings: Set = None,
    soft: Annotated[
        bool, typer.Option("--soft", help="With gates: turn units down instead of removing them; gives an adapter.")
    ] = False,
    max_perplexity_increase: Limit = 0.02,
    ablation: Ablation = "zero",
    utility_text: UtilityText = None,
    utility_tokens: UtilityTokens = 6144,
    max_markers: MaxMarkers = 0,
    random_draws: Annotated[int, typer.Option(help="Random masks to compare with.")] = 5,
    control_suite: ControlSuite = "control-colour",
    dtype: Dtype = "auto",
    matmul_precision: Precision = "highest",
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    masks_at_once: MasksAtOnce = 1,
    kept_mib: KeptMib = 1024,
    chat: Chat = "auto",
    ray: RayAddress = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also show what the model writes before and after; see secateur verify.")
    ] = False,
    verify_runs: Annotated[int, typer.Option(help="Sampled answers to each quantity prompt.")] = 5,
    temperature: Temperature = 1.0,
    classifier: ClassifierName = "auto",
    bad_label: BadLabels = None,
    overwrite: Overwrite = False,
) -> None:
    """Find the units that carry a bias, remove the few that matter, prove it on held-out data."""
    import secateur
    from secateur.evaluation.cluster import check_address
    from secateur.reports.terminal import TerminalProgress, repair_lines, repair_table

    told: dict[str, Any] = {
        "method": method,
        "options": _softly(method, _options_of(settings)) if soft else _options_of(settings),
        "random_draws": random_draws,
        **_study_settings(
            max_perplexity_increase, ablation, utility_text, utility_tokens, max_markers, control_suite,
            seed, batch_size, chat,
        ),
        "masks_at_once": masks_at_once,
        "kept_mib": kept_mib,
    }  # fmt: skip
    texts = secateur.VerificationSettings(verify_runs, temperature, classifier, tuple(bad_label or ()))
    if verify:
        told["verification"] = texts
    elif texts != secateur.VerificationSettings():
        raise SettingError("--verify-runs, --temperature, --classifier and --bad-label belong to --verify; add it.")
    asked = _suite(suite)
    check_address(ray)
    secateur.RepairSettings(**told).check()
    _check_output(output, overwrite)
    loaded = _load(model, dtype, device, device_map, trust_remote_code, matmul_precision)
    with _carried_on(output):
        result = secateur.repair(
            loaded, asked, output=output, overwrite=overwrite, progress=TerminalProgress(console), ray=ray, **told
        )
    console.print(repair_table(result))
    for line in repair_lines(result):
        console.print(escape(line))
    console.print(f"Written: {escape(str(output))}")
    if result.mask is None:
        raise typer.Exit(EXIT_NOTHING_PASSED)
    if result.verdict != "verified":
        raise typer.Exit(EXIT_NOT_VERIFIED)


@app.command()
def compare(
    model: Model = None,
    suite: SuiteName = "occupations",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for compare.json, compare.csv and report.html.")
    ] = Path("runs/compare"),
    methods: Annotated[
        str | None, typer.Option(help="Methods to compare, separated by commas [default: all]; see secateur methods.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.KEY=VALUE", help="A setting of one method; may be repeated."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small part of the data, for a first look.")] = False,
    max_perplexity_increase: Limit = 0.02,
    ablation: Ablation = "zero",
    utility_text: UtilityText = None,
    utility_tokens: UtilityTokens = 6144,
    max_markers: MaxMarkers = 0,
    random_draws: Annotated[
        int | None, typer.Option(help="Random masks whose spread is shown [default: 20, with --quick 5].")
    ] = None,
    control_suite: ControlSuite = "control-colour",
    dtype: Dtype = "auto",
    matmul_precision: Precision = "highest",
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    masks_at_once: MasksAtOnce = 1,
    kept_mib: KeptMib = 1024,
    chat: Chat = "auto",
    ray: RayAddress = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare methods on the same model, data and utility limit. An interrupted run carries on."""
    import secateur
    from secateur.evaluation.cluster import check_address
    from secateur.reports.terminal import TerminalProgress, compare_lines, compare_table

    told: dict[str, Any] = {
        "methods": _listed(methods or ""),
        "options": _options_by_method(settings),
        "random_draws": random_draws,
        "quick": quick,
        **_study_settings(
            max_perplexity_increase, ablation, utility_text, utility_tokens, max_markers, control_suite,
            seed, batch_size, chat,
        ),
        "masks_at_once": masks_at_once,
        "kept_mib": kept_mib,
    }  # fmt: skip
    asked = _suite(suite)
    check_address(ray)
    secateur.CompareSettings(**told).check()
    _check_output(output, overwrite)
    loaded = _load(model, dtype, device, device_map, trust_remote_code, matmul_precision)
    with _carried_on(output):
        result = secateur.compare(
            loaded, asked, output=output, overwrite=overwrite, progress=TerminalProgress(console), ray=ray, **told
        )
    console.print(compare_table(result))
    for line in compare_lines(result):
        console.print(escape(line))
    console.print(f"Written: {escape(str(output))}/compare.json, compare.csv, report.html")


@app.command()
def generalise(
    suites: Annotated[
        list[str],
        typer.Option(
            "--suites", "-s", help="At least two suites, separated by blanks or commas, or by repeating the option."
        ),
    ],
    more_suites: Annotated[
        list[str] | None,
        typer.Argument(metavar="SUITE", help="More suites: those after the first of --suites.", show_default=False),
    ] = None,
    model: Model = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for generalise.json, .csv, plans and report.html.")
    ] = Path("runs/generalise"),
    methods: Annotated[str, typer.Option(help="Methods, separated by commas; see secateur methods.")] = "attribution",
    modes: Annotated[
        str, typer.Option(help="Of across, attributes, languages, joint, specific and within; or all.")
    ] = "across,attributes,languages",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.KEY=VALUE", help="A setting of one method; may be repeated."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small part of the data, for a first look.")] = False,
    max_perplexity_increase: Limit = 0.02,
    ablation: Ablation = "zero",
    utility_text: UtilityText = None,
    utility_tokens: UtilityTokens = 3072,
    max_markers: MaxMarkers = 0,
    max_test_markers: Annotated[int, typer.Option(help="Markers per group in test; 0 for all.")] = 0,
    max_scenarios: Annotated[int, typer.Option(help="Scenarios of every suite, evenly spaced; 0 for all.")] = 6,
    random_draws: Annotated[
        int, typer.Option(help="Random masks of the largest repair's size, judged on every suite.")
    ] = 3,
    scenarios_left_out: Annotated[
        int, typer.Option(help="Scenarios of a suite to judge in the modes specific and within; 0 for all.")
    ] = 6,
    control_suite: ControlSuite = "control-colour",
    dtype: Dtype = "auto",
    matmul_precision: Precision = "highest",
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    masks_at_once: MasksAtOnce = 1,
    kept_mib: KeptMib = 1024,
    chat: Chat = "auto",
    ray: RayAddress = None,
    overwrite: Overwrite = False,
) -> None:
    """Find where a repair holds: fitted on one suite, judged on every other. An interrupted run carries on."""
    import secateur
    from secateur.evaluation.cluster import check_address
    from secateur.reports.terminal import TerminalProgress, generalise_lines, generalise_tables
    from secateur.studies.generalise import check_suites
    from secateur.studies.relations import MODES

    told: dict[str, Any] = {
        "methods": _listed(methods),
        "options": _options_by_method(settings),
        "modes": MODES if modes.strip() == "all" else _listed(modes),
        "random_draws": random_draws,
        "scenarios_left_out": scenarios_left_out or None,
        "quick": quick,
        **_study_settings(
            max_perplexity_increase, ablation, utility_text, utility_tokens, max_markers, control_suite,
            seed, batch_size, chat,
        ),
        "max_test_markers": max_test_markers or None,
        "max_scenarios": max_scenarios or None,
        "masks_at_once": masks_at_once,
        "kept_mib": kept_mib,
    }  # fmt: skip
    asked = _suites([name for names in (*suites, *(more_suites or ())) for name in _listed(names)])
    check_address(ray)
    chosen = secateur.GeneraliseSettings(**told)
    chosen.check()
    check_suites(asked, chosen)
    _check_output(output, overwrite)
    loaded = _load(model, dtype, device, device_map, trust_remote_code, matmul_precision)
    with _carried_on(output):
        result = secateur.generalise(
            loaded, asked, output=output, overwrite=overwrite, progress=TerminalProgress(console), ray=ray, **told
        )
    for table in generalise_tables(result, console.width):
        console.print(table)
    for line in generalise_lines(result):
        console.print(escape(line))
    console.print(f"Written: {escape(str(output))}/generalise.json, tables as .csv, plans, report.html")


@app.command()
def verify(
    plan: Annotated[Path, typer.Argument(help="A run's directory, or its plan.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for verify.json and report.html.")] = Path(
        "runs/verify"
    ),
    suite: Annotated[
        str | None,
        typer.Option("--suite", "-s", help="Another suite, or the file of the plan's [default: the plan's]."),
    ] = None,
    model: PlansModel = None,
    runs: Annotated[int, typer.Option(help="Sampled answers to each quantity prompt.")] = 5,
    temperature: Temperature = 1.0,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one open prompt a line [default: built-in neutral ones].")
    ] = None,
    classifier: ClassifierName = "auto",
    bad_label: BadLabels = None,
    worse: Annotated[float, typer.Option(help="List continuations whose score rises by at least this.")] = 0.2,
    dtype: Dtype = "auto",
    matmul_precision: Precision = "highest",
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
    batch_size: BatchSize = 128,
    overwrite: Overwrite = False,
) -> None:
    """Show what a model writes before and after a plan, on held-out markers and wordings."""
    import secateur
    from secateur.api import verification_of
    from secateur.reports.terminal import TerminalProgress, verification_lines

    told: dict[str, Any] = {
        "runs": runs,
        "temperature": temperature,
        "prompts": prompts,
        "classifier": classifier,
        "bad_labels": tuple(bad_label or ()),
        "worse": worse,
        "batch_size": batch_size,
    }
    loaded_plan = secateur.load_plan(plan)
    asked, chosen = verification_of(loaded_plan, suite, **told)
    _check_output(output, overwrite)
    chosen.check()
    loaded = _load(_model_of(loaded_plan, model), dtype, device, device_map, trust_remote_code, matmul_precision)
    result = secateur.verify(
        loaded, loaded_plan, asked, output=output, overwrite=overwrite, progress=TerminalProgress(console), **told
    )
    for line in verification_lines(result.as_dict()):
        console.print(escape(line))
    console.print(f"Written: {escape(str(output))}/verify.json, report.html")


@app.command()
def localise(
    model: Model = None,
    suite: SuiteName = "occupations",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for scores.safetensors and top.csv.")
    ] = Path("runs/localise"),
    method: MethodName = "attribution",
    settings: Set = None,
    ablation: Ablation = "zero",
    utility_text: UtilityText = None,
    utility_tokens: UtilityTokens = 6144,
    max_markers: MaxMarkers = 0,
    dtype: Dtype = "auto",
    matmul_precision: Precision = "highest",
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    chat: Chat = "auto",
    ray: RayAddress = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a method's scores of every unit, without removing any. An interrupted run carries on."""
    import secateur
    from secateur.evaluation.cluster import check_address
    from secateur.reports.terminal import TerminalProgress, localise_table

    told: dict[str, Any] = {
        "method": method,
        "options": _options_of(settings),
        **_study_settings(0.02, ablation, utility_text, utility_tokens, max_markers, "none", seed, batch_size, chat),
    }
    asked = _suite(suite)
    check_address(ray)
    secateur.LocaliseSettings(**told).check()
    _check_output(output, overwrite)
    loaded = _load(model, dtype, device, device_map, trust_remote_code, matmul_precision)
    with _carried_on(output):
        result = secateur.localise(
            loaded, asked, output=output, overwrite=overwrite, progress=TerminalProgress(console), ray=ray, **told
        )
    console.print(localise_table(result))
    for note in result.notes:
        console.print(escape(note))
    console.print(f"Written: {escape(str(output))}/scores.safetensors, top.csv, localise.json")


@app.command()
def methods() -> None:
    """List the methods and their settings."""
    from secateur.reports.terminal import methods_table

    console.print(methods_table())


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(help="A run's directory, or its plan.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the checkpoint.")],
    model: PlansModel = None,
    dtype: Dtype = "auto",
    matmul_precision: Precision = "highest",
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
) -> None:
    """Write the checkpoint of a plan, with the units zeroed; of soft gates, the adapter."""
    import secateur

    loaded_plan = secateur.load_plan(plan)
    _check_output(output, overwrite)
    loaded = _load(_model_of(loaded_plan, model), dtype, device, device_map, trust_remote_code, matmul_precision)
    written = secateur.apply(loaded, loaded_plan, output, overwrite=overwrite)
    mask = loaded_plan.mask
    console.print(f"Written: {escape(str(written))} ({mask.summary} {mask.action})")


@app.command()
def export(
    plan: Annotated[Path, typer.Argument(help="A run's directory, or its plan.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    format: Annotated[
        str,
        typer.Option("--format", "-f", help="hf (zeroed), peft (adapter), hf-uniform, compact (smaller) or gguf."),
    ] = "hf",
    multiple: Annotated[
        int | None, typer.Option(help="hf-uniform: neurons per layer are a multiple of this [default: 8].")
    ] = None,
    quantisation: Annotated[
        str | None, typer.Option(help="gguf: f16, q8_0, or keep that of the model's own file [default: f16].")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="Largest size of a weights file, such as 5GB.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also upload the result to the Hugging Face Hub.")
    ] = None,
    model: PlansModel = None,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a plan in a format that other tools load, with a model card."""
    import secateur
    from secateur.surgery import format_named
    from secateur.surgery.hub import check_hub

    told = {"multiple": multiple, "quantisation": quantisation, "shard": shard}
    options = {name: value for name, value in told.items() if value is not None}
    format_named(format, options)
    loaded_plan = secateur.load_plan(plan)
    _check_output(output, overwrite)
    if push_to_hub is not None:
        check_hub(push_to_hub)
    loaded = _load(_model_of(loaded_plan, model), dtype, device, device_map, trust_remote_code, "highest")
    written = secateur.export(
        loaded, loaded_plan, output, format=format, overwrite=overwrite, push_to_hub=push_to_hub, **options
    )
    mask = loaded_plan.mask
    console.print(f"Written: {escape(str(written))} as {format} ({mask.summary} {mask.action})")
    if push_to_hub is not None:
        console.print(f"Uploaded: {escape(push_to_hub)}")


@app.command()
def slim(
    plan: Annotated[
        Path | None, typer.Argument(help="A run's directory, or its plan.json, whose units go first [default: none].")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for the checkpoint, slim.json and report.html.")
    ] = Path("runs/slim"),
    width: Annotated[float, typer.Option(help="Share of the neurons of every layer to keep.")] = 0.8,
    kv_groups: Annotated[
        int | None, typer.Option(help="KV heads of every layer to keep, with their query heads [default: all].")
    ] = None,
    multiple: Annotated[int, typer.Option(help="Neurons per layer are a multiple of this.")] = 8,
    importance: Annotated[
        str, typer.Option(help="By which neurons go: loss, data, output, or best (on select).")
    ] = "best",
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Let the kept weights stand in for those that go.")
    ] = True,
    suite: Annotated[
        str | None, typer.Option("--suite", "-s", help="Whose bias is measured [default: the plan's, or occupations].")
    ] = None,
    model: PlansModel = None,
    utility_text: UtilityText = None,
    utility_tokens: UtilityTokens = 6144,
    control_suite: ControlSuite = "control-colour",
    dtype: Dtype = "auto",
    matmul_precision: Precision = "highest",
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: Trust = False,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of splits and intervals [default: the plan's, or 0].")
    ] = None,
    batch_size: BatchSize = 128,
    chat: Chat = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Make a smaller, faster model, every layer of the same width, and measure it before and after."""
    import secateur
    from secateur.reports.terminal import TerminalProgress, slim_table

    told: dict[str, Any] = {
        "width": width,
        "kv_heads": kv_groups,
        "multiple": multiple,
        "importance": importance,
        "calibrate": calibrate,
        **_study_settings(0.02, "zero", utility_text, utility_tokens, 0, control_suite, seed or 0, batch_size, chat),
    }
    loaded_plan = None if plan is None else secateur.load_plan(plan)
    asked = None if suite is None else _suite(suite)
    if loaded_plan is not None:
        asked, told = loaded_plan.held_out(asked, {**told, "seed": seed})
    secateur.SlimSettings(**told).check()
    _check_output(output, overwrite)
    loaded = _load(_model_of(loaded_plan, model), dtype, device, device_map, trust_remote_code, matmul_precision)
    result = secateur.slim(
        loaded, loaded_plan, asked, output=output, overwrite=overwrite, progress=TerminalProgress(console), **told
    )
    console.print(slim_table(result))
    console.print(escape(result.sentence))
    console.print(f"Written: {escape(str(output))}/checkpoint, slim.json, report.html")


@app.command()
def show(directory: Annotated[Path, typer.Argument(help="A run's directory.")]) -> None:
    """Print the result of a run, or what an interrupted one had found."""
    from secateur.reports.terminal import show_lines

    for line in show_lines(directory):
        console.print(escape(line))


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds runs.")] = Path("runs"),
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Carry on this interrupted run.")
    ] = None,
) -> None:
    """List runs, or carry one on that was interrupted."""
    from secateur.reports.terminal import runs_table
    from secateur.studies.runs import interrupted_run, list_runs

    if resume is None:
        console.print(runs_table(list_runs(folder)))
        return
    run = interrupted_run(resume)
    where = Path(run.begun_in or ".").resolve()
    there = "" if where == Path.cwd() else f"in {where}: "
    console.print(f"{escape(there)}secateur {escape(shlex.join(run.command))}")
    sys.argv[1:] = run.command
    with contextlib.chdir(where):
        app(list(run.command))


@suites_app.callback()
def suites(context: typer.Context) -> None:
    """List the built-in suites."""
    if context.invoked_subcommand is None:
        from secateur.reports.terminal import suites_table
        from secateur.suites import load_suite, suite_names

        console.print(suites_table([load_suite(name) for name in suite_names()]))


@suites_app.command("show")
def show_suite(
    name: Annotated[str, typer.Argument(help="A built-in suite's name, or the path of a YAML file.")],
    examples: Annotated[int, typer.Option(min=1, help="Filled examples to print.")] = 5,
) -> None:
    """Print a suite with filled examples."""
    from secateur.reports.terminal import suite_lines

    for line in suite_lines(_suite(name), examples):
        console.print(escape(line))


def _suite(name: str) -> Any:
    from secateur.suites import load_suite

    return load_suite(name)


def _suites(names: list[str]) -> list[Any]:
    """Suites by name or path; blanks between several methods or modes make suites of those after the first."""
    from secateur.search.methods import METHODS
    from secateur.studies.relations import MODES

    for known, what in ((METHODS, "method"), (MODES, "mode")):
        for name in names:
            if name in known:
                raise SettingError(f"'{name}' is a {what} and no suite; separate {what}s by commas and without blanks.")
    return [_suite(name) for name in names]


def _model_of(plan: Any, asked: str | None) -> str | None:
    """The model that is asked for, or else the one that a plan was made for."""
    return asked or (None if plan is None else plan.record.get("model"))


def _load(
    model: str | None, dtype: str, device: str | None, device_map: str | None, trust: bool, precision: str
) -> Any:
    import secateur

    status = console.status("Loading the model (the default one is converted on first use, about 30 s) ...")
    with status, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Matrix products")  # said below
        loaded = secateur.load(
            model,
            dtype=dtype,
            device=device,
            device_map=device_map,
            trust_remote_code=trust,
            matmul_precision=precision,  # type: ignore[arg-type]
        )
    if loaded.precision_trial is not None:
        console.print(str(loaded.precision_trial), highlight=False)
    return loaded


def _listed(names: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _options_of(pairs: list[str] | None) -> dict[str, str]:
    from secateur.search.methods import parse_options

    return parse_options(pairs or [])


def _softly(name: str, options: dict[str, str]) -> dict[str, str]:
    """The settings of a method that keeps its gates between 0 and 1."""
    from secateur.search.methods import method

    if "soft" not in method(name).settings:
        raise SettingError(
            f"The method '{name}' has no gates that --soft could keep between 0 and 1; use --method gates."
        )
    return {**options, "soft": "true"}


def _options_by_method(pairs: list[str] | None) -> dict[str, dict[str, str]]:
    by_method: dict[str, dict[str, str]] = {}
    for key, value in _options_of(pairs).items():
        name, dot, setting = key.partition(".")
        if not dot:
            raise SettingError(f"'{key}={value}' names no method; write --set METHOD.{key}={value}.")
        by_method.setdefault(name, {})[setting] = value
    return by_method


def _study_settings(
    limit: float,
    ablation: str,
    utility_text: Path | None,
    utility_tokens: int,
    max_markers: int,
    control_suite: str,
    seed: int,
    batch_size: int,
    chat: str,
) -> dict[str, Any]:
    """What every study of masks is told, from how the command line says it."""
    return {
        "max_perplexity_increase": limit,
        "ablation": ablation,
        "utility_text": utility_text,
        "utility_tokens": utility_tokens or None,
        "max_markers": max_markers or None,
        "control_suite": None if control_suite == "none" else control_suite,
        "seed": seed,
        "batch_size": batch_size,
        "chat": _chat(chat),
    }


def _chat(mode: str) -> Any:
    from secateur.measures.prompts import check_chat

    return check_chat(mode)


def _check_output(output: Path, overwrite: bool) -> None:
    from secateur.files import check_target

    check_target(output, overwrite)


class _StoppedError(Exception):
    """Ctrl-C in a run that can be carried on; says how."""


@contextlib.contextmanager
def _carried_on(output: Path) -> Iterator[None]:
    """Where Ctrl-C stops a command that writes what it has found, say how to go on."""
    from secateur.files import STATE, staging_of

    try:
        yield
    except KeyboardInterrupt as stop:
        if not (staging_of(output) / STATE).is_file():
            raise
        shown = shlex.quote(str(output))
        raise _StoppedError(
            f"The same command carries on with what was measured; secateur show {shown} tells what it has found so far."
        ) from stop


TOO_LITTLE_MEMORY = (
    "The device has too little memory; lower --batch-size or --masks-at-once, or spread the model with --device-map. "
    "A repair, compare, generalise or localise that is given again carries on with what it has measured."
)


def main() -> None:
    """Entry point: one clear sentence for a user's mistake, and a status that says what happened."""
    sys.argv[0] = "secateur"  # however it was called: runs are known by it to be those of a command
    try:
        app()
    except SecateurError as error:
        errors.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(EXIT_BAD_INPUT)
    except _StoppedError as stopped:
        errors.print(f"Interrupted. {escape(str(stopped))}", soft_wrap=True)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which this module does not import
            raise
        errors.print(f"[bold red]Error:[/] {TOO_LITTLE_MEMORY}", soft_wrap=True)
        sys.exit(EXIT_BAD_INPUT)
    except SystemExit as stop:
        if stop.code == EXIT_INTERRUPTED:  # what Typer makes of Ctrl-C
            errors.print("Interrupted.")
        raise


if __name__ == "__main__":
    main()
