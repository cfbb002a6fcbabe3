"""Which teacher and which student a script takes, and from where."""

from dataclasses import dataclass, field


@dataclass
class ModelArguments:
    """Say which models."""

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Teacher: a Hub id, a folder, or `cifar-resnet-<depth>`, which is trained on the data first. "
            "Default: cifar-resnet-20."
        },
    )
    student: str = field(
        default="cifar-resnet-8",
        metadata={"help": "Student: a Hub id, a folder, or `cifar-resnet-<depth>`, which starts from scratch."},
    )
    student_from_scratch: bool = field(
        default=False, metadata={"help": "Take only the student's configuration from --student, not its weights."}
    )
    paraphraser: str | None = field(
        default=None,
        metadata={"help": "A trained paraphraser (Hub id or folder) of this teacher; leaves stage 1 out."},
    )
    teacher_epochs: float | None = field(
        default=None,
        metadata={
            "help": "Epochs to train the teacher on the data first. Default: num_train_epochs for a teacher without "
            "weights, otherwise 0."
        },
    )
    plain_student: bool = field(
        default=True,
        metadata={"help": "Also train the same student without a teacher, on the same schedule, to compare with."},
    )
    teacher_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the teacher's repository."}
    )
    student_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the student's repository."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type that saved weights are loaded in. `auto` takes that of the file; to train faster use --bf16 "
            "instead, and --teacher_dtype for the teacher.",
            "choices": ["float32", "bfloat16", "float16", "auto"],
        },
    )
    token: str | None = field(
        default=None,
        metadata={"help": "Token for private repositories. Default: HF_TOKEN, or what `hf auth login` has stored."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run model code that comes with a Hub model. Only for repositories you trust."},
    )

    def hub(self, role: str) -> dict:
        """Return the keyword arguments of `from_pretrained` for the teacher or the student."""
        revision = self.teacher_revision if role == "teacher" else self.student_revision
        return {"revision": revision, "token": self.token, "trust_remote_code": self.trust_remote_code}
