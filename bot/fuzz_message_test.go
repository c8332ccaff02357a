package bot

import (
	"encoding/json"
	"html"
	"strings"
	"testing"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// FuzzMessage: the content of a message, and who sends it. The bot finds out whether it is spoken to, and in which thread, without stumbling; it
// never answers itself or another bot; and what it answers is a notice that mentions nobody, in which what strangers have written is
// text and no markup.
func FuzzMessage(f *testing.F) {
	for _, content := range []string{
		`{"msgtype":"m.text","body":"hello"}`, `{"msgtype":"m.text","body":"!trust help"}`, `{"msgtype":"m.notice","body":"!trust"}`,
		`{"msgtype":"m.text","body":"@bot:example.org are you there?"}`, `{"msgtype":"m.emote","body":"!trust"}`,
		`{"msgtype":"m.text","body":"hey","m.mentions":{"user_ids":["@bot:example.org"],"room":true}}`,
		`{"msgtype":"m.text","body":"hi","m.relates_to":{"rel_type":"m.thread","event_id":"$root","is_falling_back":true,"m.in_reply_to":{"event_id":"$x"}}}`,
		`{"msgtype":"m.text","body":"* hi","m.new_content":{"body":"hi"},"m.relates_to":{"rel_type":"m.replace","event_id":"$x"}}`,
		`{"algorithm":"m.megolm.v1.aes-sha2","session_id":"s","ciphertext":"c","m.relates_to":{"rel_type":"m.annotation","event_id":"$x","key":"+"}}`,
		`{"m.relates_to":null,"m.mentions":null}`, `{"body":5}`, `{"m.relates_to":[]}`, `{"m.mentions":{"user_ids":"@bot:example.org"}}`, `null`, `[]`, `"text"`, `{}`,
		`{"msgtype":"m.text","body":"<b>\u202e!trust</b>","format":"org.matrix.custom.html","formatted_body":"<script>"}`,
	} {
		for kind := range byte(len(fuzzedTypes)) {
			f.Add(kind, "@alice:example.org", []byte(content))
		}
		f.Add(byte(0), "@bot:example.org", []byte(content))
		f.Add(byte(0), "@<img src=x>&\"':example.org", []byte(content))
	}
	b := messageBot{testBot(f)}
	f.Fuzz(func(t *testing.T, kind byte, sender string, content []byte) {
		if !json.Valid(content) {
			t.Skip("it cannot come from a server")
		}
		evtType := fuzzedTypes[int(kind)%len(fuzzedTypes)]
		evt := &event.Event{ID: "$event", Sender: id.UserID(sender), Type: evtType, RoomID: "!room:example.org"}
		if json.Unmarshal(content, &evt.Content) != nil {
			t.Skip("no event that can be parsed has this content")
		}
		if evt.Content.ParseRaw(evtType) != nil {
			evt.Content.Parsed = nil // as the hook hands it on
		}
		b.checkMessage(t, evt, content)
	})
}

var fuzzedTypes = []event.Type{event.EventMessage, event.EventSticker, event.EventEncrypted, event.EventReaction}

type messageBot struct{ *Bot }

func (b messageBot) checkMessage(t *testing.T, evt *event.Event, raw []byte) {
	t.Helper()
	var said struct {
		MsgType  string `json:"msgtype"`
		Body     string `json:"body"`
		Mentions *struct {
			UserIDs []id.UserID `json:"user_ids"`
		} `json:"m.mentions"`
	}
	readable := json.Unmarshal(raw, &said) == nil && evt.Type == event.EventMessage && evt.Content.Parsed != nil
	spoken := strings.HasPrefix(said.Body, "!trust") || strings.Contains(said.Body, b.client.UserID.String())
	if said.Mentions != nil {
		for _, userID := range said.Mentions.UserIDs {
			spoken = spoken || userID == b.client.UserID
		}
	}
	if asked := b.asksUs(evt); readable && asked != spoken || !readable && evt.Content.Parsed == nil && asked {
		t.Errorf("spoken to: %v, and the bot thinks %v", spoken, asked)
	}
	forUs := b.isForUs(evt)
	if forUs && (evt.Sender == b.client.UserID || evt.Type == event.EventReaction || readable && said.MsgType == "m.notice") {
		t.Error("the bot answers itself, a reaction, or another bot")
	}
	for _, code := range []cryptohook.Code{cryptohook.CodeVerified, cryptohook.CodeSentInClear, cryptohook.CodeMismatchedSender, cryptohook.CodeUnableToDecrypt} {
		verdict := cryptohook.Verdict{EventID: evt.ID, Code: code, UserID: evt.Sender, DeviceID: id.DeviceID(evt.Sender), Reason: string(evt.Sender)}
		b.checkAnswer(t, evt, verdict)
	}
}

// ourMarkup takes out the markup that is the bot's own.
var ourMarkup = strings.NewReplacer("<strong>", "", "</strong>", "", "<em>", "", "</em>", "", "<br/>", "\n")

func (b messageBot) checkAnswer(t *testing.T, evt *event.Event, verdict cryptohook.Verdict) {
	t.Helper()
	thread := threadOf(evt)
	marshalled, err := json.Marshal(answerContent(b.speech(evt.RoomID).explain(verdict, evt.Sender), b.annotate(verdict), replyTo(evt.ID, thread)))
	if err != nil {
		t.Fatalf("the answer cannot be sent: %v", err)
	}
	var answer event.MessageEventContent
	if err = json.Unmarshal(marshalled, &answer); err != nil {
		t.Fatalf("the answer cannot be read: %v", err)
	}
	if answer.MsgType != event.MsgNotice || answer.Mentions == nil || len(answer.Mentions.UserIDs) > 0 || answer.Mentions.Room {
		t.Error("the answer is no notice, or mentions somebody")
	}
	if answer.RelatesTo.GetReplyTo() != evt.ID || answer.RelatesTo.GetThreadParent() != thread {
		t.Errorf("the answer to %s in thread %q is one to %s in %q", evt.ID, thread, answer.RelatesTo.GetReplyTo(), answer.RelatesTo.GetThreadParent())
	}
	shown := ourMarkup.Replace(answer.FormattedBody)
	if strings.ContainsAny(shown, "<>") || html.UnescapeString(shown) != answer.Body {
		t.Errorf("something that strangers wrote is markup in the answer: %q", answer.FormattedBody)
	}
	if most := 64<<10 + 40*len(evt.Sender) + 12*len(thread); len(marshalled) > most {
		t.Errorf("the answer has %d bytes, more than %d", len(marshalled), most)
	}
}
