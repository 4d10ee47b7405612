"""One optimizer step of distillation: teachers, objective and the teacher cache."""
