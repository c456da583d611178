"""Check that the trainer's image can run a launch's stages, before the launch holds a device in a cluster.

The check runs only if a stage uses something that 0.1.0 did not have, and once for each image and question: the Job stays for the profile's
`keep_s`. Owns the question and the refusal. Refuses to know what a release has (`orchestrator.recipe.image_needs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from orchestrator.errors import Refused
from orchestrator.kube import side_job
from orchestrator.kube.client import Api
from orchestrator.kube.jobs import image_check_job
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.image_needs import ImageNeeds, needs_of, new_fields, newest_config
from orchestrator.recipe.pipeline import Pipeline


def refuse_old_image(api: Api, pipeline: Pipeline, store_url: str, targets: Sequence[str], say: Callable[[str], None]) -> None:
    """Ask the image whether it has what the stages use, if it may lack it.

    Args:
        targets: names of the stages that are launched. Empty means all.
        say: gets one line when the image is asked, and a line with the reason if the Job has to wait.

    Raises:
        Refused: the image lacks something, or cannot be asked.
        Unreachable: the API server does not answer.
    """
    profile = pipeline.cluster
    assert profile is not None, f"{pipeline.name}: an image is asked in a cluster"
    stages = [stage for stage in pipeline.stages if not targets or stage.name in targets]
    needs = needs_of(stages)
    if needs is None:
        return
    uses = sorted({field for stage in stages for field in new_fields(newest_config(stage))} | set(needs.abilities))
    check(api, profile, store_url, needs, f"launch {pipeline.name}", uses, say)


def check(
    api: Api, profile: ClusterProfile, store_url: str, needs: ImageNeeds, subject: str, uses: Sequence[str], say: Callable[[str], None]
) -> None:
    """See `refuse_old_image`. `uses` is what the stages use, for people."""
    question = needs.model_dump_json()
    job = side_job.find_or_create(api, lambda number: image_check_job(profile, store_url, question, number), again=False)
    if side_job.end_of(job) is None:
        say(f"{subject}: Job {job['metadata']['name']} asks the trainer's image whether it knows {', '.join(uses)}; no device is held")
    ended = side_job.wait(api, job, subject, say)
    if not ended.answered:
        why = f": {ended.words}" if ended.words else f". See: kubectl -n {api.namespace} describe job/{ended.job}"
        raise Refused(
            f"{subject}: image {profile.image} could not be asked whether it knows {', '.join(uses)}{why}. "
            f"Mend `image` of cluster profile {profile.name}, or what keeps its pods from starting; nothing was started"
        )
    if not ended.complete:
        raise Refused(
            f"{subject}: image {profile.image} was asked whether it knows {', '.join(uses)}, and does not"
            f"{f' ({ended.words})' if ended.words else f'. See: kubectl -n {api.namespace} logs job/{ended.job}'}. "
            f"Set `image` of cluster profile {profile.name} to one of this release; nothing was started"
        )
