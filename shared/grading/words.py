"""The vocabulary: names of functions, of letters, of units, and the words that are answers."""

from __future__ import annotations

from fractions import Fraction

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc asin acos atan sinh cosh "
    "tanh coth sech csch arcsinh arccosh arctanh asinh acosh atanh ln log lg exp sqrt cbrt abs sgn "
    "gcd lcm max min floor ceil binom arsinh arcosh artanh Re Im arg det".split()
)
GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta theta vartheta iota kappa lambda sigma "
    "upsilon phi varphi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega Upsilon pi rho "
    "tau".split()
)
SHORT_GREEK = frozenset("eta mu nu xi chi psi Xi Pi varrho varsigma ell hbar aleph imath".split())

_DIMENSIONS = {  # dimension: {unit: how many of the first}
    "length": {"m": "1", "cm": "1/100", "mm": "1/1000", "km": "1000", "nm": "1/1000000000",
               "ft": "0.3048", "in": "0.0254", "yd": "0.9144", "mi": "1609.344"},
    "mass": {"g": "1", "kg": "1000", "mg": "1/1000", "lb": "453.59237", "oz": "28.349523125",
             "ton": "907184.74"},
    "time": {"s": "1", "min": "60", "h": "3600", "day": "86400", "week": "604800", "ms": "1/1000"},
    "money": {"dollar": "1", "cent": "1/100"},
    "euro": {"euro": "1"},
    "pound": {"quid": "1"},
    "rupee": {"rupee": "1"},
    "yen": {"yen": "1"},
    "volume": {"L": "1", "mL": "1/1000", "gal": "3.785411784"},
    "force": {"N": "1"}, "energy": {"J": "1", "kJ": "1000", "eV": "1.602176634e-19"},
    "power": {"W": "1", "kW": "1000"}, "current": {"A": "1"}, "voltage": {"V": "1"},
    "frequency": {"Hz": "1", "kHz": "1000", "MHz": "1000000"}, "pressure": {"Pa": "1"},
    "temperature": {"K": "1"}, "celsius": {"C": "1"}, "fahrenheit": {"F": "1"},
    "amount": {"mol": "1"}, "resistance": {"ohm": "1"}, "radian": {"rad": "1"},
    "count": {"unit": "1"},
}  # fmt: skip
_SPELLINGS = {
    "m": "meter meters metre metres", "cm": "centimeter centimeters centimetre centimetres",
    "mm": "millimeter millimeters", "km": "kilometer kilometers kilometre kilometres kms",
    "ft": "foot feet", "in": "inch inches", "yd": "yard yards", "mi": "mile miles",
    "g": "gram grams gm gms", "kg": "kilogram kilograms kgs", "mg": "milligram milligrams",
    "lb": "pound pounds lbs", "oz": "ounce ounces", "ton": "tons",
    "s": "second seconds sec secs", "min": "minute minutes mins", "h": "hour hours hr hrs",
    "day": "days", "week": "weeks", "dollar": "dollars usd bucks", "cent": "cents",
    "euro": "euros eur", "rupee": "rupees rs", "yen": "jpy", "unit": "units",
    "L": "liter liters litre litres l", "mL": "milliliter milliliters ml",
    "gal": "gallon gallons", "N": "newton newtons", "J": "joule joules", "W": "watt watts",
    "A": "amp amps ampere amperes", "V": "volt volts", "Hz": "hertz", "Pa": "pascal pascals",
    "K": "kelvin kelvins", "mol": "mole moles mols", "rad": "radian radians", "ohm": "ohms",
    "ms": "millisecond milliseconds",
}  # fmt: skip

UNITS: dict[str, tuple[str, Fraction]] = {
    unit: (dimension, Fraction(factor))
    for dimension, units in _DIMENSIONS.items()
    for unit, factor in units.items()
}
for _unit, _spelled in _SPELLINGS.items():
    for _word in _spelled.split():
        UNITS[_word] = UNITS[_unit]

QUOTIENTS = {"mph": "miles/hour", "kmh": "km/h", "kph": "km/h", "kmph": "km/h"}
DEGREES = frozenset("degree degrees deg degs".split())
PERCENTS = frozenset({"percent", "percents", "per cent", "pct"})
MULTIPLES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
             "trillion": 10**12}  # fmt: skip
POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}

EMPTY_WORDS = frozenset(
    "no solution,no solutions,no real solution,no real solutions,empty set,the empty set,empty,none"
    ",no such solution,no solution exists,there is no solution,there are no solutions".split(",")
)
REAL_WORDS = frozenset(
    "all real numbers,all reals,all real,the real numbers,real numbers,the set of real numbers"
    ",all real values,any real number,the set of all real numbers,every real number".split(",")
)
SAME_WORDS = {
    "dne": "does not exist", "doesnt exist": "does not exist", "do not exist": "does not exist",
    "infinitely many solutions": "infinitely many", "infinite solutions": "infinitely many",
    "infinite": "infinity", "infinity": "infinity", "t": "true", "f": "false",
}  # fmt: skip
NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
}

# Plain letters that are a word and no product of variables. In two letters only what nobody
# multiplies: "mg" and "in" are units inside of \\text{} alone.
_SHORT = "cm mm km ft kg lb oz hr mL ml kJ Hz kHz kW".split()
WORDS = (
    frozenset(
        "and where for any all real number numbers integer integers are the such that then when "
        "not solution solutions yes true false none each per from with".split()
    )
    | {
        word.lower()
        for word in (*UNITS, *DEGREES, *PERCENTS, *MULTIPLES, *POWERS, *QUOTIENTS)
        if len(word) > 2
    }
    - {"ton", "min", "sec", "day"}
    | {"day", "days", "tons", "mins"}
)


def is_word(run: str, *, after_value: bool) -> bool:
    """Whether plain letters, written together, are a word."""
    return run == "or" or (run in _SHORT and after_value) or (len(run) > 2 and run.lower() in WORDS)
