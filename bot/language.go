package bot

import (
	"embed"
	"fmt"

	"github.com/nicksnyder/go-i18n/v2/i18n"
	"golang.org/x/text/language"
	"gopkg.in/yaml.v3"
)

// The texts that people read, a file for each language: languages/en.yaml is the one that the others are translations of. A text's key
// is its path there. In it, {{.Name}} is what the code puts in.
//
//go:embed languages/*.yaml
var languageFiles embed.FS

// Languages are those that the bot speaks, as the configuration names them.
var Languages = []string{"en", "de"}

// speech is one language.
type speech struct{ localizer *i18n.Localizer }

// vars are what is put into a text.
type vars = map[string]any

// speeches are all languages, by their names.
var speeches = loadSpeeches()

func loadSpeeches() map[string]speech {
	bundle := i18n.NewBundle(language.English)
	bundle.RegisterUnmarshalFunc("yaml", yaml.Unmarshal)
	loaded := make(map[string]speech, len(Languages))
	for _, name := range Languages {
		if _, err := bundle.LoadMessageFileFS(languageFiles, "languages/"+name+".yaml"); err != nil {
			panic(fmt.Errorf("the texts in %s cannot be read: %w", name, err))
		}
		loaded[name] = speech{i18n.NewLocalizer(bundle, name)}
	}
	return loaded
}

// phrase gives a text. One that is missing is its key: a test looks for those.
func (s speech) phrase(key string, put vars) string {
	return s.counted(key, nil, put)
}

// counted gives a text that depends on a number: one for one, other for the rest. The number is {{.Count}} in it.
func (s speech) counted(key string, count any, put vars) string {
	if count != nil {
		put = withCount(put, count)
	}
	phrase, err := s.localizer.Localize(&i18n.LocalizeConfig{MessageID: key, TemplateData: put, PluralCount: count})
	if err != nil {
		return key
	}
	return phrase
}

func withCount(put vars, count any) vars {
	with := vars{"Count": count}
	for name, value := range put {
		with[name] = value
	}
	return with
}

// has says whether there is such a text.
func (s speech) has(key string) bool {
	_, err := s.localizer.Localize(&i18n.LocalizeConfig{MessageID: key})
	return err == nil
}

// text gives an answer: its headline, what is known, and what to do if there is anything to do.
func (s speech) text(sign, key string, put vars) text {
	t := text{sign: sign, headline: s.phrase(key+".headline", put), known: s.phrase(key+".known", put)}
	if s.has(key + ".advice") {
		t.advice = s.phrase(key+".advice", put)
	}
	return t
}
