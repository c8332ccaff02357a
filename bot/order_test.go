package bot

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

func commandBot() *Bot {
	return &Bot{config: defaultConfig(), client: &mautrix.Client{UserID: "@warden:example.com"}, displayName: "Trust Warden"}
}

// messageOf makes an event as a handler gets it.
func messageOf(t *testing.T, content any) *event.Event {
	t.Helper()
	raw, err := json.Marshal(content)
	if err != nil {
		t.Fatal(err)
	}
	evt := &event.Event{ID: "$event", RoomID: "!room:example.com", Sender: "@alice:example.com", Type: event.EventMessage}
	if err = json.Unmarshal(raw, &evt.Content); err != nil {
		t.Fatal(err)
	}
	if err = evt.Content.ParseRaw(evt.Type); err != nil {
		t.Fatal(err)
	}
	return evt
}

type object = map[string]any

func TestCommandIsRecognised(t *testing.T) {
	said := func(body string) object { return object{"msgtype": "m.text", "body": body} }
	html := func(body, formatted string) object {
		return object{"msgtype": "m.text", "body": body, "format": "org.matrix.custom.html", "formatted_body": formatted}
	}
	pill := `<a href="https://matrix.to/#/@warden:example.com">Trust Warden</a>`
	for name, test := range map[string]struct {
		content object
		command string // empty: it is none
		args    []string
		fault   string
	}{
		"alone":                     {said("!trust"), "help", nil, ""},
		"with arguments":            {said("!trust user @bob:example.com"), "user", []string{"@bob:example.com"}, ""},
		"capitals, and more spaces": {said("  !Trust   VERIFY  @Bob:example.com key "), "verify", []string{"@Bob:example.com", "key"}, ""},
		"unknown":                   {said("!trust me"), "me", nil, ""},
		"another bot's":             {said("!trusted user"), "", nil, ""},
		"in the middle":             {said("you can say !trust help"), "", nil, ""},
		"quoted":                    {said("> !trust verify @bob:example.com"), "", nil, ""},
		"below a quotation":         {object{"msgtype": "m.text", "body": "> <@bob:example.com> !trust deny\n\n!trust explain", "m.relates_to": object{"m.in_reply_to": object{"event_id": "$x"}}}, "explain", nil, ""},
		"by Matrix ID":              {said("@warden:example.com help"), "help", nil, ""},
		"by Matrix ID and colon":    {said("@warden:example.com: user @bob:example.com"), "user", []string{"@bob:example.com"}, ""},
		"by local part":             {said("warden: status"), "status", nil, ""},
		"by display name":           {said("trust warden, room"), "room", nil, ""},
		"by a name without a colon": {said("warden status"), "", nil, ""},
		"by name, and no command":   {said("warden: how are you?"), "", nil, ""},
		"by a longer name":          {said("wardens: help"), "", nil, ""},
		"by pill":                   {html("Trust Warden: help", pill+": help"), "help", nil, ""},
		"with a pill":               {html("!trust user Bob", `!trust user <a href="https://matrix.to/#/@bob:example.com">Bob</a>`), "user", []string{"@bob:example.com"}, ""},
		"a quotation in HTML": {object{
			"msgtype": "m.text", "body": "> <@bob:example.com> !trust deny\n\n!trust help", "format": "org.matrix.custom.html",
			"formatted_body": "<mx-reply><blockquote>!trust deny</blockquote></mx-reply>!trust help", "m.relates_to": object{"m.in_reply_to": object{"event_id": "$x"}},
		}, "help", nil, ""},
		"deep HTML":                   {html("!trust help", strings.Repeat("<b>", 10000)+"!trust verify"), "help", nil, ""},
		"a notice":                    {object{"msgtype": "m.notice", "body": "!trust help"}, "", nil, ""},
		"an emote":                    {object{"msgtype": "m.emote", "body": "!trust help"}, "help", nil, faultNotText},
		"the name of a file":          {object{"msgtype": "m.file", "body": "!trust help"}, "help", nil, faultNotText},
		"too long":                    {said("!trust help " + strings.Repeat("x", longestCommand)), "help", []string{strings.Repeat("x", longestCommand)}, faultTooLong},
		"a mark of direction":         {said("!trust user @bob\u202e:example.com"), "user", []string{"@bob\u202e:example.com"}, faultInvisible},
		"a character of no width":     {said("!trust user\u200b @bob:example.com"), "user\u200b", []string{"@bob:example.com"}, faultInvisible},
		"a control character":         {said("!trust user \x00"), "user", []string{"\x00"}, faultInvisible},
		"edited in":                   {object{"msgtype": "m.text", "body": "* !trust help", "m.new_content": said("!trust help"), "m.relates_to": object{"rel_type": "m.replace", "event_id": "$x"}}, "help", nil, faultEdited},
		"edited away":                 {object{"msgtype": "m.text", "body": "!trust help", "m.new_content": said("nothing"), "m.relates_to": object{"rel_type": "m.replace", "event_id": "$x"}}, "", nil, ""},
		"structured, and not written": {object{"msgtype": "m.text", "body": "hello", "org.matrix.msc4391.command": object{"command": "verify"}, "m.mentions": object{"user_ids": []string{"@warden:example.com"}}}, "", nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			o := commandBot().readOrder(messageOf(t, test.content), cryptohook.Verdict{})
			if o == nil {
				if test.command != "" {
					t.Fatal("no command was found")
				}
				return
			}
			if o.name != test.command || o.fault != test.fault || !slices.Equal(o.args, test.args) {
				t.Errorf("got %q %q, fault %q", o.name, o.args, o.fault)
			}
		})
	}
}

func TestMentionIsAnIDOrALink(t *testing.T) {
	for given, want := range map[string]id.UserID{
		"@bob:example.com":                       "@bob:example.com",
		"“@bob:example.com”":                     "@bob:example.com",
		"<https://matrix.to/#/@bob:example.com>": "@bob:example.com",
		"matrix:u/bob:example.com":               "@bob:example.com",
		"https://matrix.to/#/!room:example.com":  "https://matrix.to/#/!room:example.com",
		"bob":                                    "bob",
	} {
		if got := mention(given); got != want {
			t.Errorf("%s is read as %s", given, got)
		}
	}
}

// Whom the texts of the commands name has to be a command, and the other way round.
func TestEveryCommandHasItsFunction(t *testing.T) {
	for _, c := range commandList() {
		if c.run == nil {
			t.Errorf("%s does nothing", c.name)
		}
	}
}
