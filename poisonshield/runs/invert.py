"""Textual inversion: words for a frozen pipeline, learned from pictures that may be poisoned and defended."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from poisonshield.config import Checker, Choice
from poisonshield.data.concepts import Concept
from poisonshield.defenses.base import Defense
from poisonshield.defenses.diffusion.szt import MASKS
from poisonshield.engine.checkpoint import together
from poisonshield.engine.processes import choose_device
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.schedule import ScheduleConfig
from poisonshield.errors import CheckpointError, ConfigError
from poisonshield.evals.base import Number
from poisonshield.evals.diffusion.parts.settings import WordEvaluateConfig
from poisonshield.files import tell_of_disk
from poisonshield.models.diffusion.embeddings import load_embedding
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.registry import Registry
from poisonshield.reports import inversion_tables
from poisonshield.runs.parts.concept_sets import apply_poison, release
from poisonshield.runs.parts.reading import read_references
from poisonshield.runs.parts.training import Place, Training, TrainingSettings
from poisonshield.runs.parts.word_results import Validation, describe_training, embedding_file, finish
from poisonshield.runs.parts.word_settings import RENDERED, ConceptData, GenerateConfig, ModelConfig, choose_token
from poisonshield.runs.parts.words import build_inversion, build_trainer, load_model, open_concepts, select_for_training

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.10 has none

log = logging.getLogger(__name__)


class InvertSettings(TrainingSettings):
    """One textual inversion."""

    data: ConceptData = ConceptData()
    model: ModelConfig = ModelConfig()
    schedule: ScheduleConfig = ScheduleConfig(name="constant")
    generate: GenerateConfig = GenerateConfig()
    evaluate: WordEvaluateConfig = WordEvaluateConfig()


@dataclass(frozen=True)
class Opened:
    """The pipeline and the clean concepts of a run before its processes meet."""

    model: LatentDiffusion
    clean: tuple[Concept, ...]


class Invert(Training):
    """A run of this kind. Its results have a row for each concept."""

    name: ClassVar[str] = "invert"
    Settings: ClassVar[type[TrainingSettings]] = InvertSettings
    methods: ClassVar[Registry] = Registry("poisonshield.methods.diffusion", kind="method")
    defenses_from: ClassVar[tuple[Registry, ...]] = (
        Registry("poisonshield.defenses.diffusion", kind="defense"),
        Registry("poisonshield.defenses", kind="defense"),
    )
    poisons: ClassVar[Registry] = Registry("poisonshield.poisons.diffusion", kind="diffusion poison")
    identity: ClassVar[tuple[str, ...]] = ("concept",)
    makes: ClassVar[tuple[str, ...]] = ("validation", "pictures", "pictures.png", "evaluation.json")
    keeps: ClassVar[tuple[str, ...]] = ("concepts*", "poisoned*", "prepared")
    places: ClassVar[tuple[str, ...]] = (
        "data.train", "data.poison_cache", "model.pipeline", "generate.clean", "evaluate.networks.folders.*",
    )  # fmt: skip
    changes_after: ClassVar[tuple[str, ...]] = ("generate.", "evaluate.", "engine.device")
    scales_rate: ClassVar[bool] = False

    def pick_defense(self, checker: Checker, path: tuple, block: Any) -> Choice | None:
        """A defense for diffusion, or a purifier of any kind of training."""
        choice = super().pick_defense(checker, path, block)
        own, _ = self.defenses_from
        if choice is not None and choice.name not in own.names() and not choice.cls.purifier:
            checker.problem(
                path, f"defenses[{path[1]}]: {choice.name} defends the training of classifiers. Use a purifier, or szt."
            )
            return None
        return choice

    def check_together(self, checker: Checker, settings: InvertSettings) -> None:
        """Masks, data and precision that fit method and defenses."""
        _check_masks(checker, settings.data, [d.cls(d.config) for d in self.defenses])
        _check_data(checker, settings)
        if settings.engine.precision != "fp32":
            checker.problem(
                ("engine", "precision"),
                "engine.precision: learned vectors stay in fp32. For frozen networks in bf16 set model.dtype: bf16.",
            )
        if settings.generate.switch and self.method.cls.start_word(self.method.config) is None:
            checker.problem(
                ("generate", "switch"),
                "generate.switch speaks the word that learning started from, and method.init is numbers. Give a word.",
            )
        try:
            self.method.cls.check(self.method.config, zero_stage=settings.engine.zero_stage)
        except ConfigError as err:
            checker.problem(("method",), str(err))

    # Training

    def open(self, folder: RunFolder) -> Opened:
        """The pipeline, and the concepts; what generate.clean lacks is told now, not after training."""
        model = load_model(self.settings.model)
        clean = open_concepts(self.settings.data, model)
        if self.settings.generate.clean is not None:
            for concept in clean:
                read_references(self, concept, alone=len(clean) == 1)
        return Opened(model, clean)

    @classmethod
    def names_of_data(cls) -> Sequence[str]:
        """The rendered world and the shipped pipeline."""
        return (RENDERED, "tiny")

    def digests(self, opened: Opened) -> dict[str, str]:
        """Of the concepts and the pipeline."""
        concepts = "\n".join(f"{concept.name} {concept.digest}" for concept in opened.clean)
        return {"data.train": sha256(concepts.encode()).hexdigest(), "model.pipeline": opened.model.digest()}

    def run(self, opened: Opened, folder: RunFolder, device: torch.device) -> None:
        """Poison if asked, learn the words, write embeddings, pictures and numbers."""
        model, clean = opened.model.to(device), opened.clean
        method, defenses = build_inversion(self, model, [c.name for c in clean])
        together(folder.mark, what=f"claiming {folder.path}", only_first=True)  # before a poisoned set is put there
        concepts = select_for_training(self.settings.data, apply_poison(self, model, clean, folder.path))
        self.announce(f"of {len(concepts)} concepts on {self.settings.model.pipeline}")
        validation = Validation(self, method, folder, defenses)
        trainer = validation.trainer = build_trainer(self, method, defenses, concepts, folder, watch=validation)
        done = trainer.fit()
        state = trainer.state_dict()

        def end() -> None:
            method.vectors = torch.nn.Parameter(state["vectors"].to(device))  # whole again, where ranks had pieces
            training = describe_training(self, defenses, clean, steps=done["steps"], seconds=done["seconds"])
            with tell_of_disk(folder.path):
                finish(self, folder, method.to(device), clean=clean, trained_on=concepts, training=training)

        together(end, what="drawing and measuring", only_first=True, patient=True)

    def evaluate(self) -> list[dict[str, Any]]:
        """New pictures and numbers, which replace the old ones."""
        folder = self.folder
        if not folder.results.is_file():
            raise CheckpointError(
                f"{folder.path} is not a finished run. Train it first, or go on with engine.resume=auto."
            )
        with folder.held():
            opened = self.open(folder)
            self.refuse_other_data(folder, opened)
            self._measure_again(folder, opened)
            return json.loads(folder.results.read_text())

    def _measure_again(self, folder: RunFolder, opened: Opened) -> None:
        """Draw and measure with the words that the folder keeps."""
        old, clean = json.loads(folder.results.read_text()), opened.clean
        model = opened.model.to(choose_device(self.settings.engine.device))
        concepts = select_for_training(self.settings.data, apply_poison(self, model, clean, folder.path))
        method, _ = build_inversion(self, model, [c.name for c in concepts])
        with torch.no_grad():
            for name, placeholder in method.placeholders.items():
                kept = load_embedding(embedding_file(folder, placeholder.token), placeholder.token)
                method.rows(name).copy_(kept.vectors)
        method.to(model.alphas_cumprod.device)
        training = {row["concept"]: row for row in old}
        with tell_of_disk(folder.path):
            finish(self, folder, method, clean=clean, trained_on=concepts, training=training)

    def describe(self, values: list[dict[str, Any]]) -> str:
        """A table with a line for each concept."""
        return inversion_tables.concept_table(values)

    def write_poison(self) -> Path:
        """Poisoned pictures of every concept, with a manifest."""
        out = self.folder.path / "concepts"
        if out.exists() and not (out / "manifest.json").is_file():
            raise ConfigError(
                f"{out} is there and holds no poisoned set, so it is not replaced. Choose another run.dir, or move it "
                "away."
            )
        with self.folder.held(), tell_of_disk(self.folder.path):
            return release(self)

    # Results

    def file_of(self, concept: str) -> Path:
        """Where the run keeps the word of a concept."""
        return embedding_file(self.folder, choose_token(self.settings.data, concept))

    @classmethod
    def columns(cls, rows: Sequence[Mapping[str, Any]]) -> tuple[Number, ...]:
        """Numbers of the words' pictures."""
        return inversion_tables.columns(rows)

    @classmethod
    def places_in_rows(cls) -> tuple[str, ...]:
        """A row is of a concept, which may belong to a group."""
        return ("concept", "group")

    @classmethod
    def flatten(cls, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Scores of feature networks beside the other numbers."""
        return [inversion_tables.flat(row) for row in rows]

    @classmethod
    def compare(cls, runs: Sequence[tuple[Mapping[str, str], "Self", list[dict[str, Any]]]]) -> None:
        """How far each word is from the clean run's."""
        inversion_tables.add_word_distances(
            [inversion_tables.LearnedRun(labels, run.seed, rows, run.file_of) for labels, run, rows in runs]
        )

    @classmethod
    def summarize(cls, places: Sequence[Place]) -> str:
        """Recovery and clean cost."""
        return inversion_tables.table([(place.labels, place.rows) for place in places])

    @classmethod
    def draw(cls, path: Path, runs: Iterable[tuple[Mapping[str, str], Path]]) -> None:
        """Pictures of the words, a row for each place."""
        inversion_tables.draw_grid(path, list(runs))


def _check_masks(checker: Checker, data: ConceptData, defenses: list[Defense]) -> None:
    """Masks that a defense wants or makes, against those that the data gives."""
    wants = [d.wants_masks for d in defenses if d.wants_masks]
    names = [d.name for d in defenses if d.once]
    if twice := next((name for name in names if names.count(name) > 1), None):
        checker.problem(("defenses",), f"defenses: {twice} stands there twice. Keep one.")
    if data.masks is not None and not wants:
        checker.problem(
            ("data", "masks"),
            f"data.masks: {data.masks} is given, and no defense uses it. Add szt with mask: "
            f"{data.masks}, or set data.masks: null. To compare masks that szt makes with them, set "
            f"data.mask_reference: {data.masks} instead.",
        )
    if data.mask_reference is not None and not any(d.makes_masks for d in defenses):
        checker.problem(
            ("data", "mask_reference"),
            f"data.mask_reference: {data.mask_reference} is given, and szt makes no mask to compare with it. Set "
            f"szt's mask to {', '.join(MASKS.names())}, or leave the reference out.",
        )
    if wants and data.masks is None:
        checker.problem(
            ("data",), f"szt wants masks from {wants[0]}, and data.masks is null. Set data.masks: {wants[0]}."
        )
    if wants and data.masks not in (None, wants[0]):
        checker.problem(("data", "masks"), f"data.masks is {data.masks}, and szt wants {wants[0]}. Make them equal.")


def _check_data(checker: Checker, settings: InvertSettings) -> None:
    """Settings that nothing would use."""
    data = settings.data
    if data.poison is None:
        for name in ("poison_masks", "poison_seed"):
            if getattr(data, name) is not None:
                checker.problem(("data", name), f"data.{name} is given, and data.poison is null. Leave it out.")
    kinds = {name: getattr(data, name) for name in ("masks", "mask_reference", "poison_masks") if getattr(data, name)}
    if len(set(kinds.values())) > 1:
        given = ", ".join(f"data.{name} is {kind}" for name, kind in kinds.items())
        message = f"{given}: pictures are read with one kind of mask. Make them equal."
        checker.problem(("data", list(kinds)[-1]), message)
    if data.train == RENDERED:
        _check_rendered(checker, data, settings.generate)


def _check_rendered(checker: Checker, data: ConceptData, generate: GenerateConfig) -> None:
    """Settings that rendered pictures have no use for."""
    given = {"size": data.size is not None, "group": data.group != "all", "crop": data.crop != "center"}
    for name in (name for name, unused in given.items() if unused):
        message = f"data.{name} does nothing to rendered pictures, which are 64 px. Leave it out."
        checker.problem(("data", name), message)
    if data.left_out is not None:
        message = "data.left_out: rendered concepts are compared with fresh pictures. Leave it out."
        checker.problem(("data", "left_out"), message)
    if generate.clean is not None:
        message = "generate.clean: rendered concepts have fresh clean pictures. Leave it out."
        checker.problem(("generate", "clean"), message)
