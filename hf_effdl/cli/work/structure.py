"""Training along a path: sparsify, ticket, grow, lora-ranks."""

import warnings
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    DataCollatorWithPadding,
    ResNetForImageClassification,
    Trainer,
    set_seed,
)

from hf_effdl.cli.work.cards import write_slim_card
from hf_effdl.cli.work.cost import Cost, evaluation_cost, rehearsal, size_of, steps_of, tell, training_cost
from hf_effdl.cli.work.data import accuracy, as_pixels, labels_of, load_splits
from hf_effdl.cli.work.tasks import load_task, texts
from hf_effdl.files import filled_beside, locked, remove_weights
from hf_effdl.hub.cards import markdown_table
from hf_effdl.processes import is_first
from hf_effdl.structure.groups.find import find_groups
from hf_effdl.structure.growing.trainer import GrowingTrainer
from hf_effdl.structure.lora.select import select_lora_ranks
from hf_effdl.structure.tickets.rewind import rewind
from hf_effdl.structure.tickets.search import find_ticket
from hf_effdl.structure.training.checkpoints import has_checkpoints, newest
from hf_effdl.structure.training.trainer import SplitLBITrainer


SIZES = ("params", "macs", "latency_ms")
TUNED = "finetune"


def warn_of_rate(options: Any, args: Any) -> None:
    """Say that a rate is too large for weights that know something."""
    if not options.from_scratch and args.learning_rate >= 0.1 and not args.takes_default_rate:
        warnings.warn(
            f"learning rate {args.learning_rate} for pretrained weights: it destroys most of what they know; pass "
            "--learning_rate 0.01 or less, or --from_scratch",
            stacklevel=2,
        )


def sparsify(options: Any, args: Any) -> None:
    """See the verb."""
    warn_of_rate(options, args)
    set_seed(args.seed)
    if options.dry_run:
        with rehearsal(args):
            trainer = _trainer(options, args)[1]
            tell("sparsify", _cost(trainer, options))
        return
    _check_tuned(args)
    material, trainer = _trainer(options, args)
    small, curve = _trained(trainer, material.metric, options)
    _print_and_save(trainer, small, material.metric, options, curve)


def _trainer(options: Any, args: Any) -> tuple[Any, SplitLBITrainer]:
    material = load_task(options, args)
    return material, SplitLBITrainer(material.model, args, **material.for_trainer())


def _cost(trainer: SplitLBITrainer, options: Any) -> Cost:
    """Of the path, and of the smaller model's training; nothing is known yet of what slimming takes."""
    path = training_cost(trainer)
    steps = steps_of(trainer.args, len(trainer.get_train_dataloader()))
    each = path.seconds / steps
    more = each * options.macs * options.finetune_epochs / trainer.args.num_train_epochs * steps
    told = [f"fine-tuning for {options.finetune_epochs:g} epochs taken for {options.macs:g} of that a step"]
    small = Cost(more, size_of(trainer.model) * options.macs, told if options.finetune_epochs else [])
    curve = 4 if options.task == "image-classification" else 0
    cost = path + small + evaluation_cost(trainer, 3 + curve)
    cost.how.append("slimming is not counted")
    return cost


def _check_tuned(args: Any) -> None:
    folder = Path(args.output_dir, TUNED)
    if has_checkpoints(folder) and not args.resume_from_checkpoint:
        raise ValueError(
            f"{folder} has checkpoints of an earlier run: set another --output_dir, remove it, or go on with it by "
            "--resume_from_checkpoint True"
        )


def _trained(trainer: SplitLBITrainer, metric: str, options: Any) -> tuple[nn.Module, list[dict[str, float]]]:
    """The smaller model, fine-tuned, and the path's curve; results of all go into the trainer, for its cards."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    results = {"dense, split LBI": trainer.evaluate_model(trainer.plain_model())}
    images = options.task == "image-classification"
    curve = trainer.evaluate_path() if images else []
    bn_batches = args.bn_batches if images else 0
    small = trainer.slim(macs=options.macs, widths=options.widths, score=options.score, bn_batches=bn_batches)
    report = small.config.effdl_report
    results["slim, not fine-tuned"] = trainer.evaluate_model(small)
    if options.finetune_epochs and trainer.is_fsdp_enabled:
        trainer.accelerator.print(
            "under FSDP the slim model is not fine-tuned: train it from its folder, in a run of its own"
        )
    elif options.finetune_epochs:
        trainer.finetune(
            small,
            epochs=options.finetune_epochs,
            distill=options.teacher_share,
            output_dir=Path(args.output_dir, TUNED),
            resume_from_checkpoint=bool(args.resume_from_checkpoint),
        )
        results["slim, fine-tuned"] = trainer.evaluate_model(small)
    sides = {name: "before" if name.startswith("dense") else "after" for name in results}
    trainer.results = {
        name: {metric: found[metric], **{key: report[key][sides[name]] for key in SIZES}}
        for name, found in results.items()
    }
    return small, curve


def _print_and_save(
    trainer: SplitLBITrainer, small: nn.Module, metric: str, options: Any, curve: list[dict[str, float]]
) -> None:
    args = trainer.args
    card = {"dataset": options.dataset_name, "tasks": options.task}
    if is_first():
        remove_weights(Path(args.output_dir, "slim"))  # of another path
    trainer.save_model()
    if is_first():
        trainer.create_model_card(**card)
        folder = trainer.save_slim(small, f"{args.output_dir}/slim", **card)
        if curve:
            print("accuracy of smaller models along the path, before any fine-tuning:")
            print("".join(f"  {point['macs']:.3f} of the MACs: {point['accuracy']:.4f}\n" for point in curve), end="")
        for name, found in trainer.results.items():
            print(f"{metric} of the model, {name}: {found[metric]:.4f}")
        macs, latency = (small.config.effdl_report[key]["ratio"] for key in ("macs", "latency_ms"))
        print(f"slim model in {folder}: MACs x {macs:.3f}, latency x {latency:.3f}")
    if args.push_to_hub:
        trainer.push_to_hub(**card)
        if is_first():
            trainer.push_slim(small, f"{trainer.hub_model_id}-slim", **card)


# ---- ticket


def ticket(options: Any, args: Any) -> None:
    """See the verb."""
    warn_of_rate(options, args)
    set_seed(args.seed)
    if options.dry_run:
        with rehearsal(args):
            trainer = _trainer(options, args)[1]
            cost = training_cost(trainer, options.within)
            tell("ticket", cost + Cost(0, 2 * size_of(trainer.model)))
        return
    material, trainer = _trainer(options, args)
    if options.train:
        _train_small(trainer, material.metric, options)
        return
    found = find_ticket(
        trainer,
        **options.budget(),
        at_epoch=options.at_epoch,
        within=options.within,
        resume_from_checkpoint=args.resume_from_checkpoint,
    )
    if not is_first():
        return
    folder = Path(args.output_dir, "small")
    to = "init" if options.weights == "start" else found.step
    small = rewind(lambda: deepcopy(trainer.plain_model()), found, to)
    with locked(args.output_dir, ".lock-ticket"), locked(folder):
        remove_weights(folder)  # of another ticket
        found.save_pretrained(args.output_dir)
        with filled_beside(folder) as part:
            small.save_pretrained(part)
            material.processor.save_pretrained(part)
        write_slim_card(folder)
    report = found.report()
    print(f"found at step {found.step} of {trainer.state.max_steps}" + ("" if found.settled else ", not settled"))
    print(f"ticket in {args.output_dir}: MACs x {report['macs']['ratio']:.3f}, parameters x ", end="")
    print(f"{report['params']['ratio']:.3f}; the small net to train in {folder}")
    if args.push_to_hub:
        print(found.push_to_hub(args.hub_model_id or Path(args.output_dir).name, private=args.hub_private_repo))


def _train_small(trainer: SplitLBITrainer, metric: str, options: Any) -> None:
    """The ticket's net trained for the rest of the run, in one go."""
    args = trainer.args
    resume = bool(args.resume_from_checkpoint)
    small = trainer.train_small(**options.budget(), within=options.within, resume_from_checkpoint=resume)
    found = trainer.evaluate_model(small)[metric]
    if is_first():
        folder = trainer.save_slim(small, args.output_dir, dataset=options.dataset_name, tasks=options.task)
        macs = small.config.effdl_report["macs"]["ratio"]
        print(f"small net in {folder}: MACs x {macs:.3f}, {metric} {found:.4f}")
        if args.push_to_hub:
            trainer.push_slim(small, args.hub_model_id or Path(args.output_dir).name, dataset=options.dataset_name)


# ---- grow


def seed_config(dense: Any, widths: list[int] | None, depths: list[int] | None) -> Any:
    """The dense net's config with the widths and depths of the seed."""
    if dense.model_type != "resnet":
        raise ValueError(f"--model_name_or_path is a {dense.model_type!r}; this script grows a 'resnet'")
    config, stages = deepcopy(dense), len(dense.hidden_sizes)
    widths = widths or [max(1, width // 4) for width in (dense.embedding_size, *dense.hidden_sizes)]
    depths = depths or dense.depths
    if len(widths) != stages + 1 or len(depths) != stages:
        raise ValueError(
            f"the dense net has an embedding and {stages} stages, so --seed_widths takes {stages + 1} numbers and "
            f"--seed_depths {stages}; these are {widths} and {depths}"
        )
    config.embedding_size, config.hidden_sizes, config.depths = widths[0], widths[1:], depths
    return config


def grow(options: Any, args: Any) -> None:
    """See the verb."""
    set_seed(args.seed)
    if options.dry_run:
        with rehearsal(args):
            trainer, whole, seed = _growing(options, args)
            cost, most = training_cost(trainer, what="a step of the seed"), args.max_macs / seed["macs"]
            cost.seconds, cost.disk = cost.seconds * most, cost.disk * most
            cost.how.append(f"taken {most:.2g} times, as after the last round of growth: at most")
            tell("grow", cost)
        return
    trainer, whole, seed = _growing(options, args)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    found = trainer.evaluate()["eval_accuracy"]
    grown = trainer.groups[0].network.count()
    trainer.results = {"grown": {"accuracy": found, **{name: grown[name] for name in ("params", "macs")}}}
    trainer.save_model()
    card = {"dataset": options.dataset_name, "tasks": "image-classification"}
    if is_first():
        trainer.create_model_card(**card)
        print(f"\n{markdown_table(*trainer.growth_table())}\n")
        sizes = [f"{name} {size['macs'] / whole['macs']:.3f}" for name, size in (("seed", seed), ("grown", grown))]
        print(f"accuracy {found:.4f}; MACs beside the dense net's: {', '.join(sizes)}")
        print(f"grown model in {args.output_dir}, with its card README.md and the picture growth.png")
    if args.push_to_hub:
        trainer.push_to_hub(**card)


def _growing(options: Any, args: Any) -> tuple[GrowingTrainer, dict[str, int], dict[str, int]]:
    """The trainer of a seed, and the sizes of the dense net and of the seed."""
    data = load_splits(options, args.seed, ("image_column", "label_column"))
    name, labels = options.model_name_or_path, labels_of(data, options)
    processor = AutoImageProcessor.from_pretrained(name)
    dense = AutoConfig.from_pretrained(name, dtype=torch.float32, **labels)
    dense.name_or_path = ""  # by which a model is known that has weights from there
    model = ResNetForImageClassification(seed_config(dense, options.seed_widths, options.seed_depths))
    data = data.with_transform(as_pixels(options, processor, dense.num_channels))
    inputs = {"pixel_values": data["train"][0]["pixel_values"][None]}
    whole, seed = (find_groups(net, inputs)[0].network.count() for net in (ResNetForImageClassification(dense), model))
    args.max_macs = args.max_macs or int(options.max_macs_share * whole["macs"])
    args.remove_unused_columns = False  # the transform reads columns that the model does not know
    rows = {"train_dataset": data["train"], "eval_dataset": data["eval"], "processing_class": processor}
    return GrowingTrainer(model, args, **rows, compute_metrics=accuracy), whole, seed


# ---- lora-ranks


def lora_ranks(options: Any, args: Any) -> None:
    """See the verb."""
    if options.dry_run:
        with rehearsal(args):
            tell("lora-ranks", _lora_cost(_with_adapter(options, args)[0], options))
        return
    _check_tuned(args)
    trainer, rows = _with_adapter(options, args)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    small = select_lora_ranks(trainer.model, trainer.path, options.budget)
    size = small.effdl_report["params"]
    trainer.results = {
        "all ranks": {**trainer.evaluate_model(trainer.model), "params": size["before"]},
        f"{size['ratio']:.0%} by the path": {**trainer.evaluate_model(small), "params": size["after"]},
    }
    if options.finetune_epochs:
        tuned = copy(args)  # its checkpoints beside those of the path, which is not gone on with from them
        tuned.output_dir, tuned.num_train_epochs = str(Path(args.output_dir, TUNED)), options.finetune_epochs
        resumed = newest(tuned.output_dir, args.world_size) if args.resume_from_checkpoint else None
        Trainer(small, tuned, **rows).train(resume_from_checkpoint=resumed)
        name = f"{size['ratio']:.0%}, fine-tuned for {options.finetune_epochs} epochs"
        trainer.results[name] = {**trainer.evaluate_model(small), "params": size["after"]}
    if is_first():
        lines = [{"adapter": name, **row} for name, row in trainer.results.items()]
        columns = {"adapter": "adapter", "loss": "loss", "accuracy": "accuracy", "params": "parameters"}
        print(f"\n{markdown_table(lines, columns)}\n")
        card = {"finetuned_from": options.model_name_or_path, "dataset": options.dataset_name}
        trainer.save_slim(small, args.output_dir, **card)
        print(f"adapter in {args.output_dir}, which PEFT loads")
        if args.push_to_hub:
            trainer.push_slim(small, args.hub_model_id or Path(args.output_dir).name, **card)


def _with_adapter(options: Any, args: Any) -> tuple[SplitLBITrainer, dict[str, Any]]:
    """The trainer of a fresh adapter, and its rows for another one."""
    material = texts(options, args)
    targets = options.target_modules
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type=TaskType.SEQ_CLS,
        lora_dropout=0.05,
    )
    rows = material.for_trainer() | {"data_collator": DataCollatorWithPadding(material.processor)}
    return SplitLBITrainer(get_peft_model(material.model, config), args, **rows), rows


def _lora_cost(trainer: SplitLBITrainer, options: Any) -> Cost:
    path = training_cost(trainer)
    more = path.seconds * options.finetune_epochs / trainer.args.num_train_epochs
    told = [f"fine-tuning for {options.finetune_epochs} epochs as long a step"] if options.finetune_epochs else []
    adapter = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    return Cost(path.seconds, 2 * adapter, path.how) + Cost(more, 0, told) + evaluation_cost(trainer, 3)
