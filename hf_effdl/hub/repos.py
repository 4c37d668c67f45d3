"""Data set repositories that one kind of artefact has to itself."""

from collections.abc import Callable

from huggingface_hub import DatasetInfo, HfApi


def own_dataset_repo(
    api: HfApi, repo_id: str, private: bool | None, is_ours: Callable[[str], bool], what: str
) -> tuple[DatasetInfo, set[str]]:
    """A data set repository to push to, made if need be, and the names of the files in it.

    Args:
        api: with the token to use.
        repo_id: made where it does not exist.
        private: whether to make it private; default: the namespace's own default.
        is_ours: True for the name of a file that only this kind of artefact has.
        what: the artefact, for errors.

    Raises:
        ValueError: where the repository is public and `private=True`, or holds other data.
    """
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    head = api.dataset_info(repo_id)
    files = {sibling.rfilename for sibling in head.siblings}
    if private and not head.private:
        raise ValueError(
            f"private=True, but {repo_id} exists and is public; make it private in its settings, or push to another "
            "repository"
        )
    if files - {".gitattributes", "README.md"} and not any(is_ours(name) for name in files):
        raise ValueError(
            f"{repo_id} holds other data, whose card would be lost; push the {what} to a repository of its own"
        )
    return head, files
