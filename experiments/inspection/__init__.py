"""Looking into models: costs, samples of trained runs, captured attention calls, pretrained pipelines."""
