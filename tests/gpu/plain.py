"""What anyone would write: transformers' Trainer over PEFT's model on a 4-bit base. `steps` holds ours against it."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from nvflare_fm.config import TaskPlan
from nvflare_fm.site.model.base_model import device
from tests.gpu.measuring import on_gpu
from tests.gpu.offers import RANK, RATE


class Plain:
    """A model of its own, that is trained as often as one likes."""

    def __init__(self, folder: Path, asked: TaskPlan, rows: Any, dtype: torch.dtype) -> None:
        self.asked, self.dtype, self.peak_bytes = asked, dtype, 0
        self.rows, self.tokenizer = rows.select_columns(["input_ids", "labels"]), AutoTokenizer.from_pretrained(folder)
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        base = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=nf4, device_map={"": device()}
        )
        base.config.use_cache = False
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(base, lora)

    def train(self, at_step: Callable[[], None]) -> float:
        """The mean loss; `at_step` is called before the first step and after each."""

        class Steps(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                at_step()

            on_step_end = on_train_begin

        training = self.asked.training
        arguments = TrainingArguments(
            output_dir=tempfile.gettempdir(), max_steps=training.local_steps, learning_rate=RATE,
            per_device_train_batch_size=training.batch_size, lr_scheduler_type="constant",
            bf16=self.dtype == torch.bfloat16, gradient_checkpointing=training.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
            use_cpu=not on_gpu(), dataloader_pin_memory=on_gpu(), save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        collate = DataCollatorForSeq2Seq(self.tokenizer)
        trainer = Trainer(self.model, arguments, collate, train_dataset=self.rows, callbacks=[Steps()])
        trainer.remove_callback(PrinterCallback)
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
        loss: float = trainer.train().training_loss
        self.peak_bytes = torch.cuda.max_memory_allocated() if on_gpu() else 0
        return loss
