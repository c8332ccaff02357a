package bot

import (
	"encoding/json"
	"strings"
	"testing"

	"maunium.net/go/mautrix/id"
)

// sizeOf is how long an answer is, as the JSON of its content.
func sizeOf(t *testing.T, w words) int {
	t.Helper()
	raw, err := json.Marshal(noticeContent(w, nil))
	if err != nil {
		t.Fatal(err)
	}
	return len(raw)
}

// orderFrom is a command that somebody has given, to be answered in a language.
func orderFrom(t *testing.T, language string, sender id.UserID, name string, args ...string) *order {
	t.Helper()
	evt := messageOf(t, object{"msgtype": "m.text", "body": "!trust " + name})
	evt.Sender = sender
	return &order{evt: evt, speech: speeches[language], name: name, args: args}
}

func TestHelpHasALineAndAnExampleOfEachCommand(t *testing.T) {
	b := commandBot()
	b.config.Trust.Operators = []id.UserID{"@olga:example.com"}
	for _, language := range Languages {
		said := b.orderHelp(t.Context(), orderFrom(t, language, "@olga:example.com", "help")).words.plain()
		for _, c := range commandList() {
			line := ""
			for each := range strings.Lines(said) {
				if strings.HasPrefix(each, "• !trust "+c.name+" ") || strings.HasPrefix(each, "• !trust "+c.name+" –") {
					line = each
				}
			}
			if example, meaning, found := strings.Cut(line, " – "); !found || len(meaning) < 5 || example == "" {
				t.Errorf("%s: of %s the help says %q", language, c.name, line)
			}
		}
	}
}

func TestOperatorsCommandsAreListedForOperatorsOnly(t *testing.T) {
	for name, test := range map[string]struct {
		operators []id.UserID
		sender    id.UserID
		listed    bool
		names     string
	}{
		"an operator":   {[]id.UserID{"@olga:example.com"}, "@olga:example.com", true, ""},
		"somebody else": {[]id.UserID{"@olga:example.com"}, "@alice:example.com", false, "@olga:example.com"},
		"none at all":   {nil, "@alice:example.com", false, "names none"},
	} {
		b := commandBot()
		b.config.Trust.Operators = test.operators
		said := b.orderHelp(t.Context(), orderFrom(t, "en", test.sender, "help")).words.plain()
		if listed := strings.Contains(said, "!trust unverify"); listed != test.listed || !strings.Contains(said, test.names) || !strings.Contains(said, "!trust explain") {
			t.Errorf("%s: %s", name, said)
		}
	}
}

func TestHelpFitsOnAPhone(t *testing.T) {
	b := commandBot()
	for i := range 1000 {
		b.config.Trust.Operators = append(b.config.Trust.Operators, id.UserID("@"+strings.Repeat("x", i%200)+":example.com"))
	}
	for _, language := range Languages {
		said := b.orderHelp(t.Context(), orderFrom(t, language, "@alice:example.com", "help")).words
		if letters := len([]rune(said.plain())); letters > 1400 {
			t.Errorf("%s: the help has %d characters", language, letters)
		}
	}
}
