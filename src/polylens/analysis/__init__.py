"""Features, interactions, circuits, interventions, comparisons, directions, attacks.

What linear algebra says of a polynomial is read off its factors, in float64, on the device
of its weights.
"""

from polylens.analysis.adversarial import AttackRow as AttackRow
from polylens.analysis.adversarial import Attacks as Attacks
from polylens.analysis.adversarial import evaluate_attacks as evaluate_attacks
from polylens.analysis.adversarial import linear_attack as linear_attack
from polylens.analysis.adversarial import singular_attack as singular_attack
from polylens.analysis.adversarial import transfer as transfer
from polylens.analysis.circuits.ablation import Ablations as Ablations
from polylens.analysis.circuits.graph import Circuit as Circuit
from polylens.analysis.circuits.graph import Node as Node
from polylens.analysis.circuits.graph import Pairs as Pairs
from polylens.analysis.circuits.recurring import Circuits as Circuits
from polylens.analysis.circuits.recurring import Recurring as Recurring
from polylens.analysis.circuits.recurring import circuits as circuits
from polylens.analysis.circuits.trace import circuit as circuit
from polylens.analysis.comparison import Comparison as Comparison
from polylens.analysis.comparison import FeatureChange as FeatureChange
from polylens.analysis.comparison import LayerDistance as LayerDistance
from polylens.analysis.comparison import compare as compare
from polylens.analysis.comparison import distance as distance
from polylens.analysis.comparison import feature_changes as feature_changes
from polylens.analysis.dictionaries import sae_writers as sae_writers
from polylens.analysis.directions import OutputDirections as OutputDirections
from polylens.analysis.directions import degree_energy as degree_energy
from polylens.analysis.directions import output_directions as output_directions
from polylens.analysis.examples import Example as Example
from polylens.analysis.examples import FeatureRow as FeatureRow
from polylens.analysis.examples import LayerFeatures as LayerFeatures
from polylens.analysis.examples import examples as examples
from polylens.analysis.examples import layer_features as layer_features
from polylens.analysis.features import EigenFeatures as EigenFeatures
from polylens.analysis.features import RestrictedQuadratic as RestrictedQuadratic
from polylens.analysis.features import eigenfeatures as eigenfeatures
from polylens.analysis.features import quadratic_energy as quadratic_energy
from polylens.analysis.interactions import Interactions as Interactions
from polylens.analysis.interactions import interactions as interactions
from polylens.analysis.interactions import second_differences as second_differences
from polylens.analysis.interactions import through_norm as through_norm
from polylens.analysis.interventions import Edit as Edit
from polylens.analysis.interventions import Effect as Effect
from polylens.analysis.interventions import Effects as Effects
from polylens.analysis.interventions import intervene as intervene
from polylens.analysis.interventions import logit_gradient as logit_gradient
from polylens.analysis.layer_tokens import logit_direction as logit_direction
from polylens.analysis.linear import SingularFeatures as SingularFeatures
from polylens.analysis.linear import singular_features as singular_features
from polylens.analysis.readout import before_norm as before_norm
from polylens.analysis.readout import behind_norm as behind_norm
from polylens.analysis.readout import embedding_scores as embedding_scores
from polylens.analysis.readout import single_token as single_token
from polylens.analysis.readout import token_direction as token_direction
from polylens.analysis.readout import top_tokens as top_tokens
from polylens.analysis.readout import unembedding_scores as unembedding_scores
from polylens.analysis.writers import residual_writers as residual_writers
