from tests.models.conftest import empty_hub as empty_hub
