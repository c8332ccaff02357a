package bot

import (
	"fmt"
	"slices"
	"strings"
	"unicode"

	"go.mau.fi/util/confusable"
	"golang.org/x/text/unicode/bidi"
	"maunium.net/go/mautrix/id"
)

// Names that strangers chose: user IDs, device IDs. The specification allows ASCII in user IDs only
// (https://spec.matrix.org/v1.16/appendices/#user-identifiers), but there are older ones, and servers that let others through. Such a name may
// hold characters that nobody sees, that turn the text around them, or that look like others.

// showUser gives a user ID as people can read it: what cannot be seen is written as its number, it is not long, and it turns no text around.
func showUser(userID id.UserID) string { return showName(string(userID)) }

// showDevice does the same with a device ID, which its owner's app chose.
func showDevice(deviceID id.DeviceID) string { return showName(string(deviceID)) }

// showName shows what has no reason to hold a space: with spaces, a name could go on as a sentence of the bot's.
func showName(name string) string {
	return show(name, oddInName)
}

func oddInName(letter rune) bool { return letter == ' ' || unseen(letter) }

// showText shows words of a stranger, on one line.
func showText(words string) string { return show(words, unseen) }

func show(words string, hidden func(letter rune) bool) string {
	var shown strings.Builder
	turns := false
	for _, letter := range clip(words) {
		if hidden(letter) {
			shown.WriteString("⟨" + codePoint(letter) + "⟩")
			continue
		}
		turns = turns || rightToLeft(letter)
		shown.WriteRune(letter)
	}
	if turns {
		return leftToRightIsolate + shown.String() + popDirectionalIsolate
	}
	return shown.String()
}

// What stands between these two is laid out by itself, from the left to the right, and does not reorder what is around it.
// https://www.unicode.org/reports/tr9/#Explicit_Directional_Isolates
const (
	leftToRightIsolate    = "\u2066"
	popDirectionalIsolate = "\u2069"
)

// rightToLeft says that a letter is written from the right, like Hebrew and Arabic ones: it reorders the signs beside it.
func rightToLeft(letter rune) bool {
	properties, _ := bidi.LookupRune(letter)
	switch properties.Class() {
	case bidi.R, bidi.AL, bidi.AN:
		return true
	}
	return false
}

// unseen says that a character shows nothing: control and format characters (those of direction, zero-width ones), line ends, all spaces
// but the common one, letters that are only fillers, and what Unicode does not know.
func unseen(letter rune) bool {
	const brailleBlank = '\u2800'
	return !unicode.IsPrint(letter) || letter == brailleBlank ||
		unicode.In(letter, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector)
}

func codePoint(letter rune) string { return fmt.Sprintf("U+%04X", letter) }

const longestName = 120

// clip shortens what strangers may have made long, in characters.
func clip(name string) string {
	letters := []rune(name)
	if len(letters) <= longestName {
		return name
	}
	return string(letters[:longestName]) + "…"
}

// looksASCII says that a sign is not ASCII, but looks like one that is: a Cyrillic а, a full-width ａ, a ratio ∶ for a colon.
// After https://www.unicode.org/Public/security/latest/confusables.txt.
func looksASCII(letter rune) bool {
	twin := confusable.Skeleton(string(letter))
	return letter > unicode.MaxASCII && len(twin) == 1 && twin[0] <= unicode.MaxASCII
}

// likeLatin are the alphabets with letters that look like Latin ones.
var likeLatin = []*unicode.RangeTable{unicode.Cyrillic, unicode.Greek, unicode.Coptic, unicode.Armenian, unicode.Cherokee, unicode.Lisu}

// lookAlikes gives the letters of a user ID that may have been chosen to make it look like another one: those of likeLatin beside Latin ones
// (@аlice with a Cyrillic а), those that look like ASCII ones in a name that has no others (@сосо, Cyrillic throughout), and other signs that
// look like ASCII ones. It gives none for an honest name in another alphabet, or with accents. Each letter comes once, in the order of the name.
func lookAlikes(userID id.UserID) []rune {
	localpart, server, _ := strings.Cut(strings.TrimPrefix(string(userID), "@"), ":")
	var odd []rune
	for _, part := range []string{localpart, server} {
		for _, letter := range oddLetters(part) {
			if !slices.Contains(odd, letter) {
				odd = append(odd, letter)
			}
		}
	}
	return odd
}

func oddLetters(part string) (odd []rune) {
	mixed := strings.ContainsFunc(part, func(letter rune) bool { return unicode.Is(unicode.Latin, letter) })
	disguised := !strings.ContainsFunc(part, func(letter rune) bool { return letter > unicode.MaxASCII && !looksASCII(letter) })
	for _, letter := range part {
		beside := mixed && unicode.In(letter, likeLatin...)
		if beside || looksASCII(letter) && (disguised || unicode.In(letter, unicode.Latin, unicode.Common)) {
			odd = append(odd, letter)
		}
	}
	return odd
}

// mostOdd is how many letters of a name are listed.
const mostOdd = 5

// lookAlike warns of a user ID that may be made to look like another one, and names the letters. It is empty if nothing about it is odd.
func (s speech) lookAlike(userID id.UserID) string {
	var warnings []string
	if odd := lookAlikes(userID); len(odd) > 0 {
		warnings = append(warnings, s.phrase("name.look_alike", vars{"User": showUser(userID), "Letters": describeLetters(odd)}))
	}
	if strings.ContainsFunc(string(userID), oddInName) {
		warnings = append(warnings, s.phrase("name.invisible", vars{"User": showUser(userID)}))
	}
	return strings.Join(warnings, " ")
}

func describeLetters(letters []rune) string {
	described := make([]string, 0, mostOdd+1)
	for i, letter := range letters {
		if i == mostOdd {
			described = append(described, "…")
			break
		}
		described = append(described, showText(string(letter))+" ("+codePoint(letter)+")")
	}
	return strings.Join(described, ", ")
}
