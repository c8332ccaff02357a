package bot

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/commands"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/format"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// prefix is what a command begins with. The bot's name does as well.
const prefix = "!trust"

// longestCommand is how long a command may be, in characters. None needs a tenth of it.
const longestCommand = 1000

// quotes are what people, and their apps, put around words.
const quotes = "\"'`“”„‘’‚«»<>"

// order is a command that somebody has given.
type order struct {
	evt     *event.Event
	verdict cryptohook.Verdict
	speech  speech
	// name is the command's; "help" if there is none. args are the words after it.
	name string
	args []string
	// fault is the key of why it is not carried out, whatever it says; empty: it may be.
	fault string
}

// What keeps something that looks like a command from being one.
const (
	faultEdited    = "edited"    // it was put into a message later
	faultNotText   = "not_text"  // it is the name of a file, or the like
	faultTooLong   = "too_long"  // nobody can see at a glance what it says
	faultInvisible = "invisible" // it has characters that nobody can see
)

// readOrder gives the command in a message, or nothing if there is none.
func (b *Bot) readOrder(evt *event.Event, verdict cryptohook.Verdict) *order {
	content, isMessage := evt.Content.Parsed.(*event.MessageEventContent)
	if evt.Type != event.EventMessage || !isMessage || content.MsgType == event.MsgNotice {
		return nil
	}
	o := &order{evt: evt, verdict: verdict, speech: b.speech(evt.RoomID)}
	if content.RelatesTo.GetReplaceID() != "" {
		o.fault = faultEdited
		if content.NewContent == nil {
			return nil
		}
		content = content.NewContent
	}
	text := commandText(content)
	if !b.takeWords(o, text) {
		return nil
	}
	switch {
	case o.fault != "":
	case content.MsgType != event.MsgText:
		o.fault = faultNotText
	case utf8.RuneCountInString(text) > longestCommand:
		o.fault = faultTooLong
	case strings.ContainsFunc(text, isInvisible):
		o.fault = faultInvisible
	}
	return o
}

// commandText is what a message says, with the Matrix IDs of those whom it mentions.
func commandText(content *event.MessageEventContent) string {
	body, formatted := content.Body, content.FormattedBody
	if content.RelatesTo.GetReplyTo() != "" { // older apps put the message that is answered before the answer
		body, formatted = event.TrimReplyFallbackText(body), event.TrimReplyFallbackHTML(formatted)
	}
	if content.Format != event.FormatHTML || len(formatted) > 8*longestCommand {
		return strings.TrimSpace(body)
	}
	return strings.TrimSpace(commands.IDHTMLParser.Parse(formatted, format.NewContext(context.Background())))
}

// takeWords splits a text that is addressed to the bot. It says no to any other.
func (b *Bot) takeWords(o *order, text string) bool {
	if len(text) > 64*longestCommand {
		text = text[:64*longestCommand]
	}
	split := commands.RawTextToEvent[struct{}](context.Background(), o.evt, text)
	if split.Command == prefix {
		o.name, o.args = "help", split.Args
		if len(split.Args) > 0 {
			o.name, o.args = strings.ToLower(split.Args[0]), split.Args[1:]
		}
		return true
	}
	rest, addressed := b.afterName(text)
	if !addressed {
		return false
	}
	parts := strings.Fields(rest)
	if len(parts) == 0 {
		return false
	}
	o.name, o.args = strings.ToLower(parts[0]), parts[1:]
	// Most of what people say to somebody is no command.
	_, known := findCommand(o.name)
	return known
}

// afterName gives what follows the bot's name, if a text begins with that: its Matrix ID, its local part or its display name, and then a
// colon or a comma. After the Matrix ID those may be missing.
func (b *Bot) afterName(text string) (rest string, addressed bool) {
	userID := b.client.UserID
	localpart, _, _ := userID.Parse()
	for _, name := range []string{userID.String(), "@" + localpart, localpart, b.displayName} {
		after, named := cutPrefixFold(text, name)
		if !named || name == "" {
			continue
		}
		separated := strings.TrimLeft(after, ":,")
		if separated != after || name == userID.String() && strings.TrimLeftFunc(after, unicode.IsSpace) != after {
			return separated, true
		}
	}
	return "", false
}

// cutPrefixFold is strings.CutPrefix that takes capitals for the same.
func cutPrefixFold(text, start string) (after string, found bool) {
	if len(text) < len(start) || !strings.EqualFold(text[:len(start)], start) {
		return text, false
	}
	return text[len(start):], true
}

// isInvisible says that a character has no look of its own, and may change how others look: control characters, and marks of direction.
func isInvisible(c rune) bool {
	return c == utf8.RuneError || unicode.Is(unicode.Cf, c) || unicode.IsControl(c) && !unicode.IsSpace(c)
}

// fetchEvent asks the homeserver for an event of a room; nil: it has none, or keeps it from us.
func (b *Bot) fetchEvent(ctx context.Context, roomID id.RoomID, eventID id.EventID) (*event.Event, error) {
	evt, err := b.client.GetEvent(ctx, roomID, eventID)
	switch {
	case errors.Is(err, mautrix.MNotFound), errors.Is(err, mautrix.MForbidden):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("failed to fetch %s: %w", eventID, err)
	case evt == nil || evt.Sender == "" || evt.Type.Type == "":
		return nil, nil
	}
	evt.ID, evt.RoomID = eventID, roomID
	evt.Type.Class = event.MessageEventType
	if evt.Content.ParseRaw(evt.Type) != nil {
		evt.Content.Parsed = nil
	}
	return evt, nil
}

// aboutOf is the message that an answer of ours is about, by its relation, which is never encrypted; empty: it is about none.
func aboutOf(answer *event.Event) id.EventID {
	relation := relationOf(answer)
	if annotated := relation.GetAnnotationID(); annotated != "" {
		return annotated
	}
	return relation.GetReplyTo()
}

// learnDisplayName asks what the bot is called, for commands that begin with its name.
func (b *Bot) learnDisplayName(ctx context.Context) {
	name, err := b.client.GetOwnDisplayName(ctx)
	if err != nil {
		b.log.Debug().Err(err).Msg("Failed to ask for the bot's own display name")
		return
	}
	b.displayName = strings.TrimSpace(name.DisplayName)
}
