"""Small random transformers over grids and frames, and documents for them."""

from multidiff.models import MaskedDiffusionTransformer
from multidiff.sequence import SharedVocabulary
from multidiff.sequence.sequencer import Sequencer
from tests.helpers.toys import Frames, Grid, generator

TOKENIZERS = {"picture": Grid(5, 2, 3), "speech": Frames((4, 3))}
VOCABULARY = SharedVocabulary.of(TOKENIZERS)
SEQUENCER = Sequencer(TOKENIZERS, VOCABULARY)
PICTURE = VOCABULARY.spans["picture"][0]


def transformer(**options):
    options = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, **options}
    model = MaskedDiffusionTransformer(VOCABULARY.rows, **options)
    model.initialize(generator())
    for weight in model.parameters():  # leave the small initial regime, where everything looks alike
        weight.data.mul_(3)
    return model.eval()


def segments(frames, pictures):
    speech = SEQUENCER.given("speech", TOKENIZERS["speech"].encode([[1, 2] * frames])[0])
    picture = SEQUENCER.given("picture", TOKENIZERS["picture"].encode([[0, 1, 2, 3, 4, 0]])[0])
    return [speech, *[picture] * pictures]


def run(model, batch, positions, **options):
    return model(batch.ids_P, batch.positions_P3, batch.document_starts, positions, batch.coords_P3, **options)
