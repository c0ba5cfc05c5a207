"""What the synthetic corpus says: commands with numbers, dates and times, in four languages.

A sentence is drawn as what it means, and a grammar for each language says it: two languages' words
for one meaning are translations of each other. English is in capitals, as LibriSpeech writes; the
others are in lower case with their accents. In no language do two meanings have the same words.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple


class Time(NamedTuple):
    """A time of day: `form` is clock, half (past the hour) or quarter (to it)."""

    hour: int  # 1 to 12
    minute: int  # 1 to 59, of the form clock
    form: str
    part: str  # of the day: morning, evening or nothing


class Date(NamedTuple):
    """A day of the year."""

    day: int  # 1 to 31
    month: int  # 0 to 11


class Sentence(NamedTuple):
    """A meaning: the name of a method of every grammar below, and its arguments."""

    kind: str
    values: tuple[Any, ...]


def draw(rng: random.Random) -> Sentence:
    """Draws a meaning."""
    number, choice = rng.randint, rng.choice
    kinds: tuple[tuple[str, Callable[[], tuple[Any, ...]]], ...] = (
        ("call", lambda: (rng.choices(range(10), k=number(3, 6)),)),
        ("alarm", lambda: (_time(rng),)),
        ("wake", lambda: (choice(range(7)), _time(rng))),
        ("timer", lambda: (number(2, 59), choice(["minutes", "hours"]))),
        ("meeting", lambda: (_date(rng),)),
        ("move", lambda: (_date(rng), choice(range(7)))),
        ("turn", lambda: (choice(["on", "off"]), choice(["light", "radio"]), _time(rng))),
        ("play", lambda: (number(1, 59), number(1, 20))),
    )
    kind, values = choice(kinds)
    return Sentence(kind, values())


def _time(rng: random.Random) -> Time:
    hour, minute = rng.randint(1, 12), rng.randint(1, 59)
    form = rng.choice(["clock", "clock", "half", "quarter"])
    return Time(hour, minute, form, rng.choice(["", "morning", "evening"]))


def _date(rng: random.Random) -> Date:
    return Date(rng.randint(1, 31), rng.choice(range(12)))


def say(sentence: Sentence, language: str) -> str:
    """The words of a meaning in one of `LANGUAGES`."""
    return getattr(LANGUAGES[language], sentence.kind)(*sentence.values)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _tens(n: int, tens: str) -> str:
    """The word of the tens of a number from 20 on; `tens` are the words from twenty on."""
    return tens.split()[n // 10 - 2]


class English:
    """Numbers, dates and times as they are read out."""

    units = _words(
        "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWELVE THIRTEEN FOURTEEN "
        "FIFTEEN SIXTEEN SEVENTEEN EIGHTEEN NINETEEN"
    )
    ordinals = _words(
        "FIRST SECOND THIRD FOURTH FIFTH SIXTH SEVENTH EIGHTH NINTH TENTH ELEVENTH TWELFTH "
        "THIRTEENTH FOURTEENTH FIFTEENTH SIXTEENTH SEVENTEENTH EIGHTEENTH NINETEENTH TWENTIETH"
    )
    months = _words(
        "JANUARY FEBRUARY MARCH APRIL MAY JUNE JULY AUGUST SEPTEMBER OCTOBER NOVEMBER DECEMBER"
    )
    days = _words("MONDAY TUESDAY WEDNESDAY THURSDAY FRIDAY SATURDAY SUNDAY")

    def number(self, n: int) -> str:
        """0 to 59."""
        if n < 20:
            return self.units[n]
        tens = _tens(n, "TWENTY THIRTY FORTY FIFTY")
        return f"{tens} {self.units[n % 10]}" if n % 10 else tens

    def ordinal(self, n: int) -> str:
        """1st to 31st."""
        if n <= 20:
            return self.ordinals[n - 1]
        return "THIRTIETH" if n == 30 else f"{self.number(n - n % 10)} {self.ordinals[n % 10 - 1]}"

    def date(self, date: Date) -> str:
        return f"THE {self.ordinal(date.day)} OF {self.months[date.month]}"

    def time(self, time: Time) -> str:
        hour = self.number(time.hour)
        minute = ("OH " if time.minute < 10 else "") + self.number(time.minute)
        forms = {"half": f"HALF PAST {hour}", "quarter": f"QUARTER TO {hour}"}
        parts = {"morning": " IN THE MORNING", "evening": " IN THE EVENING"}
        return forms.get(time.form, f"{hour} {minute}") + parts.get(time.part, "")

    def call(self, digits: list[int]) -> str:
        return "CALL " + " ".join(map(self.number, digits))

    def alarm(self, time: Time) -> str:
        return f"SET AN ALARM FOR {self.time(time)}"

    def wake(self, day: int, time: Time) -> str:
        return f"WAKE ME UP ON {self.days[day]} AT {self.time(time)}"

    def timer(self, count: int, unit: str) -> str:
        return f"SET A TIMER FOR {self.number(count)} {unit.upper()}"

    def meeting(self, date: Date) -> str:
        return f"THE MEETING IS ON {self.date(date)}"

    def move(self, date: Date, day: int) -> str:
        return f"MOVE THE MEETING FROM {self.date(date)} TO {self.days[day]}"

    def turn(self, way: str, thing: str, time: Time) -> str:
        return f"TURN {way.upper()} THE {thing.upper()} AT {self.time(time)}"

    def play(self, track: int, volume: int) -> str:
        return f"PLAY TRACK {self.number(track)} AT VOLUME {self.number(volume)}"


class Spanish:
    """A number that ends in one agrees with what it counts: veintiún minutos, veintiuna horas."""

    units = _words(
        "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince "
        "dieciséis diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés "
        "veinticuatro veinticinco veintiséis veintisiete veintiocho veintinueve"
    )
    months = _words(
        "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre"
    )
    days = _words("lunes martes miércoles jueves viernes sábado domingo")

    def number(self, n: int, ending: str = "uno") -> str:
        """0 to 59; `ending` is how one ends: uno by itself, un or una before a noun."""
        if n < 30:
            found = self.units[n]
        else:
            tens = _tens(n, "veinte treinta cuarenta cincuenta")
            found = f"{tens} y {self.units[n % 10]}" if n % 10 else tens
        if not found.endswith("uno"):
            return found
        ending = "ún" if (n, ending) == (21, "un") else ending  # stressed at its end
        return found.removesuffix("uno") + ending

    def date(self, date: Date) -> str:
        day = "primero" if date.day == 1 else self.number(date.day)
        return f"{day} de {self.months[date.month]}"

    def time(self, time: Time) -> str:
        """With its article: hours are feminine, and one of them is not several."""
        hour = f"{'la' if time.hour == 1 else 'las'} {self.number(time.hour, 'una')}"
        forms = {"half": " y media", "quarter": " menos cuarto"}
        parts = {"morning": " de la mañana", "evening": " de la noche"}
        minutes = forms.get(time.form, f" y {self.number(time.minute)}")
        return hour + minutes + parts.get(time.part, "")

    def call(self, digits: list[int]) -> str:
        return "llama al " + " ".join(map(self.number, digits))

    def alarm(self, time: Time) -> str:
        return f"pon una alarma para {self.time(time)}"

    def wake(self, day: int, time: Time) -> str:
        return f"despiértame el {self.days[day]} a {self.time(time)}"

    def timer(self, count: int, unit: str) -> str:
        nouns = {"minutes": ("un", "minutos"), "hours": ("una", "horas")}
        ending, noun = nouns[unit]
        return f"pon un temporizador de {self.number(count, ending)} {noun}"

    def meeting(self, date: Date) -> str:
        return f"la reunión es el {self.date(date)}"

    def move(self, date: Date, day: int) -> str:
        return f"mueve la reunión del {self.date(date)} al {self.days[day]}"

    def turn(self, way: str, thing: str, time: Time) -> str:
        verb = {"on": "enciende", "off": "apaga"}[way]
        noun = {"light": "la luz", "radio": "la radio"}[thing]
        return f"{verb} {noun} a {self.time(time)}"

    def play(self, track: int, volume: int) -> str:
        return f"reproduce la pista {self.number(track)} a volumen {self.number(volume)}"


class French:
    """Hours and minutes are feminine, and so is a one that counts them: vingt et une heures."""

    units = _words(
        "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze "
        "seize dix-sept dix-huit dix-neuf"
    )
    months = _words(
        "janvier février mars avril mai juin juillet août septembre octobre novembre décembre"
    )
    days = _words("lundi mardi mercredi jeudi vendredi samedi dimanche")

    def number(self, n: int, feminine: bool = False) -> str:
        """0 to 59."""
        one = "une" if feminine else "un"
        if n < 20:
            return one if n == 1 else self.units[n]
        tens = _tens(n, "vingt trente quarante cinquante")
        if n % 10 == 1:
            return f"{tens} et {one}"
        return f"{tens}-{self.units[n % 10]}" if n % 10 else tens

    def date(self, date: Date) -> str:
        day = "premier" if date.day == 1 else self.number(date.day)
        return f"{day} {self.months[date.month]}"

    def time(self, time: Time) -> str:
        hour = f"{self.number(time.hour, True)} {'heure' if time.hour == 1 else 'heures'}"
        forms = {"half": " et demie", "quarter": " moins le quart"}
        parts = {"morning": " du matin", "evening": " du soir"}
        minutes = forms.get(time.form, f" {self.number(time.minute, True)}")
        return hour + minutes + parts.get(time.part, "")

    def call(self, digits: list[int]) -> str:
        return "appelle le " + " ".join(map(self.number, digits))

    def alarm(self, time: Time) -> str:
        return f"mets une alarme pour {self.time(time)}"

    def wake(self, day: int, time: Time) -> str:
        return f"réveille-moi {self.days[day]} à {self.time(time)}"

    def timer(self, count: int, unit: str) -> str:
        noun = {"minutes": "minutes", "hours": "heures"}[unit]
        return f"mets un minuteur de {self.number(count, True)} {noun}"

    def meeting(self, date: Date) -> str:
        return f"la réunion est le {self.date(date)}"

    def move(self, date: Date, day: int) -> str:
        return f"déplace la réunion du {self.date(date)} au {self.days[day]}"

    def turn(self, way: str, thing: str, time: Time) -> str:
        verb = {"on": "allume", "off": "éteins"}[way]
        noun = {"light": "la lumière", "radio": "la radio"}[thing]
        return f"{verb} {noun} à {self.time(time)}"

    def play(self, track: int, volume: int) -> str:
        return f"joue la piste {self.number(track)} au volume {self.number(volume)}"


class German:
    """Units before tens, the half hour before the hour that it leads to, verbs in two parts."""

    units = _words(
        "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
        "fünfzehn sechzehn siebzehn achtzehn neunzehn"
    )
    months = _words(
        "januar februar märz april mai juni juli august september oktober november dezember"
    )
    days = _words("montag dienstag mittwoch donnerstag freitag samstag sonntag")

    def number(self, n: int) -> str:
        """0 to 59."""
        if n < 20:
            return self.units[n]
        tens = _tens(n, "zwanzig dreißig vierzig fünfzig")
        unit = "ein" if n % 10 == 1 else self.units[n % 10]
        return f"{unit}und{tens}" if n % 10 else tens

    def date(self, date: Date) -> str:
        """In the dative, as am and vom ask for."""
        irregular = {1: "ersten", 3: "dritten", 7: "siebten"}
        usual = self.number(date.day) + ("ten" if date.day < 20 else "sten")
        return f"{irregular.get(date.day, usual)} {self.months[date.month]}"

    def time(self, time: Time) -> str:
        clock = "ein" if time.hour == 1 else self.number(time.hour)
        forms = {
            "half": f"halb {self.number(time.hour % 12 + 1)}",
            "quarter": f"viertel vor {self.number(time.hour)}",
        }
        parts = {"morning": " morgens", "evening": " abends"}
        found = forms.get(time.form, f"{clock} uhr {self.number(time.minute)}")
        return found + parts.get(time.part, "")

    def call(self, digits: list[int]) -> str:
        return f"ruf {' '.join(map(self.number, digits))} an"

    def alarm(self, time: Time) -> str:
        return f"stell einen wecker auf {self.time(time)}"

    def wake(self, day: int, time: Time) -> str:
        return f"weck mich am {self.days[day]} um {self.time(time)}"

    def timer(self, count: int, unit: str) -> str:
        noun = {"minutes": "minuten", "hours": "stunden"}[unit]
        return f"stell einen timer auf {self.number(count)} {noun}"

    def meeting(self, date: Date) -> str:
        return f"das treffen ist am {self.date(date)}"

    def move(self, date: Date, day: int) -> str:
        return f"verschieb das treffen vom {self.date(date)} auf {self.days[day]}"

    def turn(self, way: str, thing: str, time: Time) -> str:
        noun = {"light": "das licht", "radio": "das radio"}[thing]
        return f"schalte {noun} um {self.time(time)} {'ein' if way == 'on' else 'aus'}"

    def play(self, track: int, volume: int) -> str:
        return f"spiel titel {self.number(track)} mit lautstärke {self.number(volume)}"


LANGUAGES = {"en": English(), "es": Spanish(), "fr": French(), "de": German()}
