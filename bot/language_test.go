package bot

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/template"

	"gopkg.in/yaml.v3"
)

// pluralForms are the ends of keys whose text depends on a number: https://www.unicode.org/cldr/charts/latest/supplemental/language_plural_rules.html
var pluralForms = []string{"one", "other"}

// textsOf reads a language's file: the texts by their keys, and those that depend on a number by their keys and forms.
func textsOf(t *testing.T, language string) map[string]string {
	t.Helper()
	raw, err := languageFiles.ReadFile("languages/" + language + ".yaml")
	if err != nil {
		t.Fatal(err)
	}
	var root yaml.Node
	if err = yaml.Unmarshal(raw, &root); err != nil {
		t.Fatal(err)
	}
	texts := make(map[string]string)
	collectTexts(t, language, root.Content[0], "", texts)
	return texts
}

func collectTexts(t *testing.T, language string, section *yaml.Node, path string, texts map[string]string) {
	t.Helper()
	for i := 0; i+1 < len(section.Content); i += 2 {
		name, value := section.Content[i].Value, section.Content[i+1]
		key := joinKey(path, name)
		switch {
		case strings.Contains(name, "."):
			t.Errorf("%s: %s has a dot within: it cannot be told from a section", language, key)
		case value.Kind == yaml.MappingNode:
			collectTexts(t, language, value, key, texts)
		case value.Kind != yaml.ScalarNode || value.Value == "":
			t.Errorf("%s: %s is no text", language, key)
		case texts[key] != "":
			t.Errorf("%s: %s is there twice", language, key)
		default:
			texts[key] = value.Value
		}
	}
}

var placeholder = regexp.MustCompile(`\{\{[^}]*\}\}`)

// placeholdersOf are what is put into a text, each once.
func placeholdersOf(text string) []string {
	return slices.Compact(slices.Sorted(slices.Values(placeholder.FindAllString(text, -1))))
}

func TestLanguagesHaveTheSameTexts(t *testing.T) {
	original := textsOf(t, "en")
	if len(original) < 100 {
		t.Fatalf("there are only %d texts", len(original))
	}
	for _, language := range Languages[1:] {
		translated := textsOf(t, language)
		for key, text := range original {
			translation, there := translated[key]
			if !there {
				t.Errorf("%s has no %s", language, key)
			} else if want, got := placeholdersOf(text), placeholdersOf(translation); !slices.Equal(got, want) {
				t.Errorf("%s: into %s is put %v, and into the English one %v", language, key, got, want)
			}
		}
		for key := range translated {
			if _, there := original[key]; !there {
				t.Errorf("%s is in %s, and not in English", key, language)
			}
		}
	}
}

// A text with an error in it, or with a plural form that is missing, would be its key for whoever reads it.
func TestTextsCanBeFilledIn(t *testing.T) {
	for _, language := range Languages {
		texts := textsOf(t, language)
		for key, text := range texts {
			if _, err := template.New(key).Parse(text); err != nil {
				t.Errorf("%s: %s cannot be read: %v", language, key, err)
			}
			base, form := cutLast(key)
			if slices.Contains(pluralForms, form) {
				for _, other := range pluralForms {
					if texts[base+"."+other] == "" {
						t.Errorf("%s: %s lacks the form %q", language, base, other)
					}
				}
				key = base
			}
			if said := speeches[language].counted(key, 2, nil); said == key {
				t.Errorf("%s: %s is not found", language, key)
			}
		}
	}
}

func cutLast(key string) (section, name string) {
	at := strings.LastIndexByte(key, '.')
	return key[:max(at, 0)], key[at+1:]
}

// jargon is what nobody needs to know who reads a message; details under "small print" are for those who do. A word in it is one in the text, too.
var jargon = regexp.MustCompile(`(?i)\b(MSK|USK|SSK|TOFU|Olm|Megolm|curve25519|ed25519|cross[- ]?sign\w*|self[- ]?signing|user[- ]?signing|` +
	`SAS|MSC\d*|ratchet|pickle|algorithm|Algorithmus|forwarded_room_key|to-device|sync token|Quersignatur\w*)\b`)

// smallPrintKeys are the sections with details for those who know what they mean.
var smallPrintKeys = regexp.MustCompile(`(^|\.)(small_print|detail(s|_[a-z_]+)?)(\.|$)`)

func TestTextsHaveNoJargon(t *testing.T) {
	for _, language := range Languages {
		for key, text := range textsOf(t, language) {
			if smallPrintKeys.MatchString(key) {
				continue
			}
			if found := jargon.FindString(placeholder.ReplaceAllString(text, "")); found != "" {
				t.Errorf("%s: %s speaks of %q: %s", language, key, found, text)
			}
		}
	}
	for _, word := range []string{"the MSK", "Megolm", "cross-signed", "Cross-Signing", "ed25519", "self-signing key"} {
		if !jargon.MatchString(word) {
			t.Errorf("%q is not jargon", word)
		}
	}
}

// Quotation marks, and marks that belong to the programs' language alone.
func TestTextsHaveTheQuotationMarksOfTheirLanguage(t *testing.T) {
	opening, closing := map[string]string{"en": "“", "de": "„"}, map[string]string{"en": "”", "de": "“"}
	for _, language := range Languages {
		for key, text := range textsOf(t, language) {
			if strings.Count(text, opening[language]) != strings.Count(text, closing[language]) {
				t.Errorf("%s: %s opens and closes quotations differently: %s", language, key, text)
			}
			if language == "de" && strings.ContainsAny(text, "\"”‘") {
				t.Errorf("%s: %s has quotation marks of another language: %s", language, key, text)
			}
		}
	}
}

// usedKeys are the texts that the code asks for.
type usedKeys struct {
	// whole are given as they are; text gives several, by the ends of the key.
	whole map[string][]string
	// begun are the beginnings of keys that go on with what the code knows only when it runs: "verdict." + code.
	begun map[string]bool
	// literals are all strings in the code: every text's key, or a beginning of it, must be one.
	literals map[string]bool
}

// keyArgument is which argument of a method of [speech] is a key, and partsOf what it is put together with.
var (
	keyArgument = map[string]int{"phrase": 0, "counted": 0, "has": 0, "text": 1}
	partsOf     = map[string][]string{"phrase": {""}, "counted": {""}, "has": {}, "text": {".headline", ".known"}}
)

func readUsedKeys(t *testing.T) usedKeys {
	t.Helper()
	used := usedKeys{whole: make(map[string][]string), begun: make(map[string]bool), literals: make(map[string]bool)}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, source, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, used.see)
	}
	return used
}

func (u usedKeys) see(node ast.Node) bool {
	switch node := node.(type) {
	case *ast.BasicLit:
		if node.Kind == token.STRING {
			u.literals[unquoted(node)] = true
		}
	case *ast.CallExpr:
		method, isMethod := node.Fun.(*ast.SelectorExpr)
		if !isMethod {
			break
		}
		if at, known := keyArgument[method.Sel.Name]; known && at < len(node.Args) {
			u.seeKey(node.Args[at], partsOf[method.Sel.Name])
		}
	}
	return true
}

// seeKey reads a key where it is used: "section.key", "section." + name, or "section." + name + ".key". Others are variables: their values are
// literals elsewhere, or begin with one.
func (u usedKeys) seeKey(key ast.Expr, parts []string) {
	switch key := key.(type) {
	case *ast.BasicLit:
		if key.Kind == token.STRING {
			u.whole[unquoted(key)] = append(u.whole[unquoted(key)], parts...)
		}
	case *ast.BinaryExpr:
		left := key.X
		for {
			sum, isSum := left.(*ast.BinaryExpr)
			if !isSum {
				break
			}
			left = sum.X
		}
		if begin, isLiteral := left.(*ast.BasicLit); isLiteral && begin.Kind == token.STRING {
			u.begun[unquoted(begin)] = true
		}
	}
}

func unquoted(literal *ast.BasicLit) string {
	text, _ := strconv.Unquote(literal.Value)
	return text
}

func TestTextsThatTheCodeAsksForAreThere(t *testing.T) {
	texts, used := textsOf(t, "en"), readUsedKeys(t)
	there := make(map[string]bool)
	for key := range texts {
		base, form := cutLast(key)
		there[key] = true
		if slices.Contains(pluralForms, form) {
			there[base] = true
		}
	}
	if len(used.whole) < 10 || len(used.begun) < 2 {
		t.Fatalf("the code was not understood: %d keys, %d beginnings", len(used.whole), len(used.begun))
	}
	for key, parts := range used.whole {
		for _, part := range parts {
			if !there[key+part] {
				t.Errorf("the code asks for %s, and it is not there", key+part)
			}
		}
	}
	for begin := range used.begun {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(texts)), func(key string) bool { return strings.HasPrefix(key, begin) }) {
			t.Errorf("the code asks for texts that begin with %s, and there are none", begin)
		}
	}
}

func TestTextsAreAllUsed(t *testing.T) {
	used := readUsedKeys(t)
	for key := range textsOf(t, "en") {
		if !isUsed(key, used.literals) {
			t.Errorf("nothing asks for %s", key)
		}
	}
}

// endings are what the code adds to a key: see [speech.text] and [speech.counted].
var endings = append([]string{"headline", "known", "advice"}, pluralForms...)

// isUsed says that a key is a string in the code, with or without what the code adds to it, or begins with one that goes on: "section.", and
// perhaps "section.key_". A section alone is too little: its name may be a word of another meaning.
func isUsed(key string, literals map[string]bool) bool {
	for end := len(key); end > 0; end-- {
		if last := key[end-1]; (last == '.' || last == '_') && literals[key[:end]] {
			return true
		}
	}
	for {
		if literals[key] {
			return true
		}
		rest, ending := cutLast(key)
		if !slices.Contains(endings, ending) {
			return false
		}
		key = rest
	}
}

func TestMissingTextIsItsKey(t *testing.T) {
	for _, s := range speeches {
		if said := s.phrase("no.such.text", nil); said != "no.such.text" || s.has("no.such.text") {
			t.Errorf("says %q", said)
		}
	}
	got := speeches["de"].text(signPlain, "command.unknown", vars{"Command": "<x>"})
	if got.advice != "" || got.headline != "Den Befehl „<x>“ kenne ich nicht." {
		t.Errorf("%+v", got)
	}
}
