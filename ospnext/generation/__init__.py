"""What `ospnext generate` does around a pipeline: settings, prompt files, jobs, plan, manifest, resuming."""
